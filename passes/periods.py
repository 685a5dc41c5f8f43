"""Where a sequence repeats itself: candidate runs of blocks, from the sequence of ops alone."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# To how many later occurrences of an n-gram (n ops in a row) the distance is taken. A block may hold this many equal
# n-grams before its period is missed.
_OCCURRENCES = 8
_GRAMS = (1, 4, 16)
# The n by which a recurrence is told from an accident.
_TELLING = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Run:
    """Positions `start..stop` of a sequence in which each element equals the one `period` before it."""

    start: int
    stop: int
    period: int


def find_runs(sequence: Sequence[Hashable], min_length: int) -> Iterator[Run]:
    """Maximal runs of at least `min_length` whole periods, by period, smallest first.

    Runs of different periods may overlap: every multiple of a period is one too. Near linear: the candidate periods
    are the distances at which the same n-gram of ops recurs.
    """
    codes: dict[Hashable, int] = {}
    numbers = np.array([codes.setdefault(item, len(codes)) for item in sequence], dtype=np.int64)
    for period in _candidate_periods(numbers, min_length):
        equal = numbers[period:] == numbers[:-period]
        for first, last in _true_stretches(equal):
            if last - first >= (min_length - 1) * period:
                yield Run(first, last + period, period)


def _candidate_periods(numbers: np.ndarray, min_length: int) -> list[int]:
    codes = _gram_codes(numbers)
    periods: set[int] = set()
    for n in _GRAMS:
        if n in codes:
            periods |= _recurring_distances(codes, n, min_length)
    return sorted(periods)


def _gram_codes(numbers: np.ndarray) -> dict[int, np.ndarray]:
    """By n, one code for each n-gram of the sequence; equal n-grams have equal codes."""
    found = {1: numbers}
    for width in _TELLING[1:]:
        codes, half = found[width // 2], width // 2
        if len(numbers) < width:
            break
        pairs = codes[:-half] * (int(codes.max(initial=0)) + 1) + codes[half:]
        found[width] = np.unique(pairs, return_inverse=True)[1].astype(np.int64)
    return found


def _recurring_distances(every: dict[int, np.ndarray], n: int, min_length: int) -> set[int]:
    codes = every[n]
    order = np.argsort(codes, kind="stable")
    grouped = codes[order]
    found: set[int] = set()
    for ahead in range(1, _OCCURRENCES + 1):
        same = grouped[ahead:] == grouped[:-ahead]
        first = order[:-ahead][same]
        distances = order[ahead:][same] - first
        distances = distances[_is_no_accident(every, first, distances, min_length)]
        values, counts = np.unique(distances, return_counts=True)
        longest = len(codes) // min_length + 1
        found.update(int(v) for v in values[(counts >= min_length - 1) & (values <= longest)])
    return found


def _is_no_accident(
    codes: dict[int, np.ndarray], first: np.ndarray, distances: np.ndarray, min_length: int
) -> np.ndarray:
    """Whether what recurs at some distance does so before or after `first` as long as it would in a run.

    In a run, `(min_length - 1) * distance` elements in a row equal the ones at that distance: half of them before `first`
    or half of them from it on. In random ops nearly nothing else recurs that long.
    """
    kept = np.zeros(len(first), dtype=bool)
    widths = np.array(list(codes))
    half = ((min_length - 1) * distances + 1) // 2
    chosen = np.searchsorted(widths, half, side="right") - 1
    for index, width in enumerate(widths.tolist()):
        among = np.flatnonzero(chosen == index)
        for start in (first[among], first[among] - width + 1):
            stop = start + distances[among]
            inside = (start >= 0) & (stop < len(codes[width]))
            equal = codes[width][start[inside]] == codes[width][stop[inside]]
            kept[among[inside][equal]] = True
    return kept


def _true_stretches(flags: np.ndarray) -> list[tuple[int, int]]:
    """`(first, past_last)` of each maximal stretch of `True`."""
    padded = np.concatenate(([False], flags, [False])).astype(np.int8)
    edges = np.diff(padded)
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True))
