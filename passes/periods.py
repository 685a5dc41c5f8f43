"""Where a sequence repeats itself: candidate runs of blocks, from the sequence of ops alone."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# How many later occurrences of the same window are looked at. A block may hold this many equal windows of
# `_WINDOW` ops before its period is missed.
_LOOK_AHEAD = 8
_WINDOWS = (1, 4, 16)


@dataclass(frozen=True)
class Run:
    """Positions `start..stop` of a sequence in which each element equals the one `period` before it."""

    start: int
    stop: int
    period: int


def find_runs(sequence: Sequence[Hashable], min_length: int) -> Iterator[Run]:
    """Maximal runs of at least `min_length` whole periods, by period, smallest first.

    Runs of different periods may overlap: every multiple of a period is one too. Near linear: the candidate periods
    are the distances at which the same window of ops recurs.
    """
    codes: dict[Hashable, int] = {}
    numbers = np.array([codes.setdefault(item, len(codes)) for item in sequence], dtype=np.int64)
    for period in _candidate_periods(numbers, min_length):
        equal = numbers[period:] == numbers[:-period]
        for first, last in _true_stretches(equal):
            if last - first >= (min_length - 1) * period:
                yield Run(first, last + period, period)


def _candidate_periods(numbers: np.ndarray, min_length: int) -> list[int]:
    periods: set[int] = set()
    for window in _WINDOWS:
        if len(numbers) >= window:
            periods |= _recurring_distances(_window_codes(numbers, window), min_length)
    return sorted(periods)


def _window_codes(numbers: np.ndarray, window: int) -> np.ndarray:
    """One code for each window of the sequence; equal windows have equal codes."""
    codes, width = numbers, 1
    while width < window:
        pairs = codes[:-width] * (int(codes.max(initial=0)) + 1) + codes[width:]
        codes = np.unique(pairs, return_inverse=True)[1].astype(np.int64)
        width *= 2
    return codes


def _recurring_distances(codes: np.ndarray, min_length: int) -> set[int]:
    order = np.argsort(codes, kind="stable")
    grouped = codes[order]
    found: set[int] = set()
    for ahead in range(1, _LOOK_AHEAD + 1):
        same = grouped[ahead:] == grouped[:-ahead]
        distances = (order[ahead:] - order[:-ahead])[same]
        values, counts = np.unique(distances, return_counts=True)
        longest = len(codes) // min_length + 1
        found.update(int(v) for v in values[(counts >= min_length - 1) & (values <= longest)])
    return found


def _true_stretches(flags: np.ndarray) -> list[tuple[int, int]]:
    """`(first, past_last)` of each maximal stretch of `True`."""
    padded = np.concatenate(([False], flags, [False])).astype(np.int8)
    edges = np.diff(padded)
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True))
