"""Timing on a machine that others use too: in rounds, the minimum of each, and what cannot be trusted said so.

A minimum is the one number that load only ever makes larger. All that is compared is called in turn, so that a burst of
somebody else's work meets everybody; what is too long to be called whole is called at two sizes, and a line through both
says what the whole takes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

Name = TypeVar("Name")

# Rounds that are made at the least and at the most.
FEWEST_ROUNDS, MOST_ROUNDS = 5, 25
# How many times slower than the best a steady time is that need not be taken again, and one that is not steady.
HOPELESS, FAR = 3.0, 10.0
# A time is steady where the third least is within this of the least. One that never is, or whose median is so many times the
# least, was disturbed.
_STEADY, _SPREAD = 1.15, 3.0
# How far behind the best threads are that share their work only where they found no core.
_STALLED = 1.5
# Calls shorter than this are made twice, and the second counts: the first finds the caches full of others'.
_SHORT_SECONDS = 0.02
# Sizes grow by this. Of less than so many blocks much is no block.
_STEP, _SMALLEST = 4, 4


@dataclass(eq=False)
class Series:
    """The times of one thing, by how many blocks of the chain it goes through.

    Attributes:
        length: blocks of the whole chain.
        fixed: seconds that come on top of each call of all blocks.
    """

    length: int
    fixed: float = 0.0
    times: dict[int, list[float]] = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        """Those that tell what all blocks take: all of them, or else the two largest timed."""
        known = sorted(self.times)
        return known[-1:] if known[-1] == self.length else known[-2:]

    @property
    def points(self) -> tuple[tuple[int, float], ...]:
        """(blocks, seconds) that tell what all blocks take: the two largest that were timed, and the smallest worth calling.

        Where they are not steady, what a smaller part says may be less, and then is nearer the truth: its calls are shorter, and
        likelier to have been let alone.
        """
        least = {size: min(times) for size, times in sorted(self.times.items())}
        parts = [size for size in least if size >= _SMALLEST or size == max(least)]
        line = tuple((size, least[size]) for size in sorted({*parts[:1], *self.sizes}))
        if self.is_steady:
            return line
        return min(line, *(((size, least[size]),) for size in parts), key=lambda points: along(points, self.length))

    @property
    def seconds(self) -> float:
        """Of all blocks."""
        return along(self.points, self.length) + self.fixed

    @property
    def is_steady(self) -> bool:
        """Whether the least was met again."""
        return all(len(t) > 2 and sorted(t)[2] <= _STEADY * min(t) for t in map(self.times.__getitem__, self.sizes))

    @property
    def spread(self) -> float:
        """How far the median is from the least."""
        return max(statistics.median(t) / max(min(t), 1e-9) for t in map(self.times.__getitem__, self.sizes))

    @property
    def is_disturbed(self) -> bool:
        return self.spread > _SPREAD or not self.is_steady


def along(points: Sequence[tuple[int, float]], length: int) -> float:
    """What `length` blocks take, on the line through the last two points."""
    most, seconds = points[-1]
    if most == length:
        return seconds
    each = seconds / most
    if len(points) > 1:
        fewer, less = points[-2]
        rise = (seconds - less) / (most - fewer)
        each = rise if rise > 0 else each
    return seconds + each * (length - most)


@dataclass(eq=False)
class Entrant:
    """Something that is timed, in one call for one thing or several.

    Attributes:
        make: for so many blocks, a call that returns the seconds of each thing.
        series: of each thing, by its name.
        is_shared: whether threads share the work, so that a busy machine may slow it down a hundredfold.
        is_alone: whether it does by one thread what threads might share.
        adds_nothing: whether it does what the model's own ops do.
        is_out: whether it cannot win.
    """

    make: Callable[[int], Callable[[], dict[Any, float]]]
    series: dict[Any, Series]
    is_shared: bool = False
    is_alone: bool = False
    adds_nothing: bool = False
    is_out: bool = False
    _calls: dict[int, Callable[[], dict[Any, float]]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return next(iter(self.series.values())).length

    @property
    def sizes(self) -> list[int]:
        return next(iter(self.series.values())).sizes

    @property
    def is_timed(self) -> bool:
        return any(one.times for one in self.series.values())

    def take(self, size: int) -> float:
        """Time a call; what it took with all that belongs to it."""
        began = time.perf_counter()
        call = self._calls.get(size) or self._calls.setdefault(size, self.make(size))
        taken = call()
        if sum(taken.values()) < _SHORT_SECONDS:
            taken = call()
        for name, seconds in taken.items():
            self.series[name].times.setdefault(size, []).append(seconds)
        return time.perf_counter() - began

    def expected(self, size: int) -> float:
        """What a call is going to take at the least, from the largest that was timed."""
        return sum(
            along(one.points, size) if size > max(one.times) else min(one.times[size]) for one in self.series.values()
        )

    def grow(self, first: int, share: float, ends: float) -> None:
        """Time more and more blocks, from `first` on, as long as a call takes less than a share of the time there is."""
        if not self.is_timed:
            self.take(min(first, self.length))
        while (size := self.sizes[-1]) < self.length:
            more = min(_STEP * size, self.length)
            if self.expected(more) > share or time.perf_counter() + self.expected(more) > ends:
                return
            self.take(more)
            for known in [known for known in self._calls if known not in self.sizes]:
                del self._calls[known]  # with the tensors that it holds


def compete(
    entrants: Sequence[Entrant],
    rivals: Callable[[Any], Hashable | None],
    ends: float,
    bar: Callable[[], float] = lambda: math.inf,
) -> None:
    """Call all in turn until the least of each is steady, nobody has a rival any more, or the time is over.

    Args:
        rivals: by the name of a thing what it competes for; `None` for what has no rivals.
        ends: when the time is over. Nothing begins that would not end before.
        bar: seconds beyond which nothing can win.
    """
    for round_ in range(MOST_ROUNDS):
        alive = [entrant for entrant in entrants if not entrant.is_out]
        if not has_rivals(alive, rivals):
            return
        for entrant in alive[round_ % max(len(alive), 1) :] + alive[: round_ % max(len(alive), 1)]:
            for size in entrant.sizes:
                if time.perf_counter() + entrant.expected(size) <= ends:
                    entrant.take(size)
        best = drop_hopeless(entrants, rivals, bar())
        if time.perf_counter() > ends:
            return
        left = [entrant for entrant in alive if not entrant.is_out]
        if round_ + 1 >= FEWEST_ROUNDS and all(_is_settled(entrant, rivals, best) for entrant in left):
            return


def _is_settled(entrant: Entrant, rivals: Callable[[Any], Hashable | None], best: dict[Hashable, float]) -> bool:
    """Whether more calls would say nothing new. A team that is far behind was stalled, perhaps in all of them."""
    return all(
        one.is_steady and not (entrant.is_shared and one.seconds > _STALLED * best.get(rivals(name), math.inf))
        for name, one in entrant.series.items()
    )


def has_rivals(alive: Sequence[Entrant], rivals: Callable[[Any], Hashable | None]) -> bool:
    """Whether two compete for one thing."""
    prizes = [prize for entrant in alive for name in entrant.series if (prize := rivals(name)) is not None]
    return len(set(prizes)) < len(prizes)


def drop_hopeless(
    entrants: Sequence[Entrant], rivals: Callable[[Any], Hashable | None], bar: float = math.inf
) -> dict[Hashable, float]:
    """Take out who is far from the best in all that it does, unless it may have been disturbed; the best by prize."""
    best: dict[Hashable, float] = {}
    for entrant in entrants:
        for name, one in entrant.series.items():
            if (prize := rivals(name)) is not None:
                best[prize] = min(one.seconds, best.get(prize, one.seconds))
    for entrant in entrants:
        entrant.is_out |= all(
            rivals(name) is not None and _is_hopeless(one, best[rivals(name)], bar, entrant.is_shared)
            for name, one in entrant.series.items()
        )
    return best


def _is_hopeless(one: Series, best: float, bar: float, is_shared: bool) -> bool:
    known = min(len(one.times[size]) for size in one.sizes)
    if is_shared or known < 2:  # a team may be stalled time and again
        return False
    return one.seconds > min(FAR * best, bar) or (one.is_steady and one.seconds > HOPELESS * best)


def least_in_turn(timed: Mapping[Name, Callable[[], float]], rounds: int, budget: float) -> dict[Name, float]:
    """The least seconds of each of some things, which are called in turn: so many rounds, as far as they begin within the budget.

    Args:
        timed: each returns the seconds that it took.
        budget: seconds; one round is made in any case.
    """
    ends = time.perf_counter() + budget
    least = {name: call() for name, call in timed.items()}
    for _ in range(rounds - 1):
        if time.perf_counter() > ends:
            break
        least = {name: min(least[name], call()) for name, call in timed.items()}
    return least


def once(run: Callable[[], Any], device: torch.device) -> float:
    """The seconds of a call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
