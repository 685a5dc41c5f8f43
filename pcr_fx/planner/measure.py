"""What the ways through a chain cost, measured on the tensors at hand."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pcr_fx.call import Call
from pcr_fx.errors import is_out_of_memory
from pcr_fx.planner.choice import ADAM, NO_WAYS, STACKING, Timing
from pcr_fx.planner.entrants import ADDING, Entrants
from pcr_fx.planner.rounds import HOPELESS, Entrant, Series, compete, drop_hopeless, once
from pcr_fx.planner.watch import OFF
from pcr_fx.solvers import Outcome, Settings, SolveStats
from pcr_fx.targets.cpp.threads import insisting
from pcr_fx.ways import EAGER, Backward, Case, Forward, Solution, candidates

log = logging.getLogger(__name__)

# A share of the budget that one call may take while it is not known yet who can win, and of what is left then all calls of one
# round.
_CALL_SHARE, _ROUND_SHARE = 0.04, 0.15
# What a call of an optimizer may take of it.
_OPTIMIZER_SHARE = 0.005
# A share of what is left to find out who cannot win, and one that a first solve by what iterates may take.
_SIFT_SHARE, _SOLVE_SHARE = 0.25, 0.1
# Iterations that no solver does without.
_FEWEST_ITERATIONS = 2
# What takes as many times longer than the model's own ops in all can win in no direction.
_BEYOND_EAGER = 2.0
# What threads that share may take at the most, by what one takes, and for calling them.
_NO_SLOWER, _TEAM_SECONDS = 1.5, 1e-4
# A share of the budget in which measurements kept on disk are looked into, and calls for that.
_CHECK_SHARE, _CHECKS = 0.15, 3


def measure(
    case: Case,
    settings: Settings,
    call: Call,
    needs_gradient: bool,
    are_stacked: bool = False,
    with_eager: bool = True,
) -> tuple[Timing, ...]:
    """The time of every way through the chain that an estimate cannot rule out, within the budget.

    Args:
        call: of the shapes and on the device that matter; how many iterations a solver needs depends on its values.
        needs_gradient: whether the ways back are measured too.
        are_stacked: whether operands came from the blocks' own tensors, which each call has to stack again.
        with_eager: whether the model's own ops are among the ways.
    """
    with _uncollected, insisting():
        return _Measurement(case, settings, call, needs_gradient, are_stacked, with_eager).run()


def is_plausible(
    case: Case, settings: Settings, call: Call, needs_gradient: bool, are_stacked: bool, timings: Sequence[Timing]
) -> bool:
    """Whether a few calls agree with what was measured before: none takes half of that, or twice.

    Of the model's own ops and all that goes block by block, on few blocks: that takes a small part of what measuring does.
    """
    with _uncollected, insisting():
        return _Measurement(case, settings, call, needs_gradient, are_stacked, True).agrees(timings)


class _Uncollected(contextlib.AbstractContextManager[None]):
    """No garbage collection, as in `timeit`: going through all objects of a large model takes half a second.

    Of threads that measure at once the first turns it off, and the last turns it on again.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.collects = threading.Lock(), 0, False

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.collects = gc.isenabled()
                gc.disable()
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside and self.collects:
                gc.enable()


_uncollected = _Uncollected()


class _Measurement:
    def __init__(
        self,
        case: Case,
        settings: Settings,
        call: Call,
        needs_gradient: bool,
        are_stacked: bool,
        with_eager: bool,
    ) -> None:
        self.case, self.settings, self.are_stacked, self.with_eager = case, settings, are_stacked, with_eager
        self.make = Entrants(case, settings, call, needs_gradient, are_stacked)
        self.call, self.directions = self.make.call, self.make.directions
        self._wanted = case.program.wanted
        self.budget = case.options.planning_budget
        self.ends = time.perf_counter() + self.budget
        # Ways that were not timed, and what could be.
        self.timings: list[Timing] = []
        self.entrants: list[Entrant] = []
        self.iterations: dict[str, int] = {}
        self._eagers = {(EAGER, direction) for direction in self.directions}
        self.most: dict[tuple[str, str], float] = {}

    def run(self) -> tuple[Timing, ...]:
        ways = {direction: self._candidates(direction) for direction in self.directions}
        if self.with_eager:
            self._enter(EAGER, "forward", self.make.eager)
        # Block by block first: those are sure to end, and rule out others.
        self._enter_all(ways, lambda way: not way.iterates)
        if self.are_stacked:
            self._enter(STACKING, "forward", self.make.stacking)
            if "backward" in self.directions:
                self._enter(ADAM, "backward", self._optimizing)
        self._enter_all(ways, lambda way: way.iterates)
        self._sift()
        self._spare_what_adds_nothing()
        self._grow()
        compete(self.entrants, _prize, self.ends, self._bar)
        timings = (*self._results(), *self.timings)
        for timing in timings:
            log.info("chain of %d blocks, %s: %s", self.case.program.length, timing.direction, timing)
        return timings

    def agrees(self, timings: Sequence[Timing]) -> bool:
        """`is_plausible`."""
        self.ends = time.perf_counter() + _CHECK_SHARE * self.budget
        kept = {(t.way, t.direction): t for t in timings if t.points}
        makers: dict[tuple[str, str], Callable[[], Entrant | None]] = {}
        shared: set[tuple[str, str]] = set()
        if (EAGER, "forward") in kept:
            makers[EAGER, "forward"] = self.make.eager
        for direction in self.directions:
            for way in self._candidates(direction):
                if way.iterates:
                    continue
                if (way.name, direction) in kept:
                    makers[way.name, direction] = partial(self._block_by_block, way, direction)
                    if way.is_shared(self.case, direction):
                        shared.add((way.name, direction))
                elif not any((t.way, t.direction) == (way.name, direction) for t in timings):
                    return False  # it was not there to be timed
        return all(
            self._agrees(entrant, kept, name in shared)
            for name, make in makers.items()
            if (entrant := make()) is not None
        )

    def _agrees(self, entrant: Entrant, kept: dict[tuple[str, str], Timing], is_shared: bool) -> bool:
        known = next(kept[thing] for thing in entrant.series if thing in kept)
        for size, _ in known.points:
            if entrant.is_timed and time.perf_counter() + _CHECKS * entrant.expected(size) > self.ends:
                return True
            for _ in range(_CHECKS):
                entrant.take(size)
            for thing, series in entrant.series.items():
                before = dict(kept[thing].points).get(size) if thing in kept else None
                now = min(series.times[size])
                # A busy machine slows threads down that share their work, and says nothing of what they take in peace.
                if before is not None and (now < before / OFF or (now > before * OFF and not is_shared)):
                    log.info("%s took %.3g ms and now %.3g: measured anew", thing, 1e3 * before, 1e3 * now)
                    return False
        return True

    def _candidates(self, direction: str) -> list[Forward | Backward]:
        ways, refused = candidates(self.case, direction)
        self.timings += [Timing(none.name, direction, None, note=none.reason) for none in refused]
        return ways

    # --- who is timed ---------------------------------------------------------------------------------------

    def _enter_all(
        self, ways: dict[str, list[Forward | Backward]], which: Callable[[Forward | Backward], bool]
    ) -> None:
        for direction, all_of in ways.items():
            those = [way for way in all_of if which(way)]
            estimates = {way: way.bounds(self.case, direction) for way in those}
            # What is likely to be fast comes first.
            for way in sorted(those, key=lambda way: estimates[way][1]):
                least, most = estimates[way]
                best = min([self._best(direction), *(upper for _, upper in estimates.values())])
                self.most[way.name, direction] = most
                if least > best:
                    self._note(way.name, direction, f"at least {1e3 * least:.2g} ms by estimate")
                elif way.iterates:
                    self._enter(way.name, direction, partial(self._iterating, way, direction, least))
                else:
                    self._enter(way.name, direction, partial(self._block_by_block, way, direction))

    def _enter(self, name: str, direction: str, make: Callable[[], Entrant | None]) -> None:
        """Take something in and time it on few blocks, or say why it cannot be timed."""
        if time.perf_counter() > self.ends:
            self._note(name, direction, f"the budget of {self.budget:g} s was spent", skipped=True)
            return
        try:
            entrant = make()
            if entrant is not None:
                share = _CALL_SHARE * self.budget * (0.25 if name in NO_WAYS else 1.0)
                entrant.grow(1, share, self.ends)
                self.entrants.append(entrant)
        except Exception as error:
            self._note(name, direction, _in_words(error))

    def _optimizing(self) -> Entrant:
        """What only the report tells of: a few calls will do."""
        entrant = self.make.optimizing()
        entrant.grow(1, _OPTIMIZER_SHARE * self.budget, self.ends)
        for size in 2 * entrant.sizes:
            entrant.take(size)
        entrant.is_out = True
        return entrant

    def _note(self, name: str, direction: str, note: str, skipped: bool = False) -> None:
        self.timings.append(Timing(name, direction, None, note=note, skipped=skipped))

    def _best(self, direction: str) -> float:
        found = (
            series.seconds for e in self.entrants for name, series in e.series.items() if _prize(name) == direction
        )
        return min(found, default=math.inf)

    def _sift(self) -> None:
        """Call all a few times more, and take out who is far behind."""
        ends = time.perf_counter() + _SIFT_SHARE * (self.ends - time.perf_counter())
        for _ in range(2):
            for entrant in self.entrants:
                for size in entrant.sizes:
                    if not entrant.is_out and time.perf_counter() + entrant.expected(size) <= ends:
                        entrant.take(size)
        drop_hopeless(self.entrants, _prize, self._bar())

    def _spare_what_adds_nothing(self) -> None:
        """Where only what does as the model's own ops do is left beside these, nothing hangs on which of them is faster."""
        others = [
            e
            for e in self.entrants
            if not e.is_out and any(map(_prize, e.series)) and not e.series.keys() & self._eagers
        ]
        if self.with_eager and all(entrant.adds_nothing for entrant in others):
            for entrant in others:
                entrant.is_out = True

    def _bar(self) -> float:
        """Seconds beyond which no way of one direction can win, whatever disturbed it: twice what eager takes in all."""
        eager = [
            one.seconds for e in self.entrants for (name, of), one in e.series.items() if (name, of) in self._eagers
        ]
        return _BEYOND_EAGER * sum(eager) if eager else math.inf

    def _grow(self) -> None:
        """Time those that can still win on as many blocks as several rounds of all have the time for."""
        alive = [entrant for entrant in self.entrants if not entrant.is_out]
        share = _ROUND_SHARE * max(self.ends - time.perf_counter(), 0.0) / max(len(alive), 1)
        for entrant in alive:
            try:
                entrant.grow(1, share, self.ends)
            except Exception as error:
                log.debug("it could not be timed on more blocks", exc_info=error)

    def _results(self) -> list[Timing]:
        found: dict[tuple[str, str], Timing] = {}
        adding: dict[str, float] = {}
        for entrant in self.entrants:
            for (name, direction), series in entrant.series.items():
                if direction == ADDING:
                    adding[name] = series.seconds
                    continue
                size = series.points[-1][0]
                found[name, direction] = Timing(
                    name,
                    direction,
                    series.seconds,
                    self.iterations.get(name, 0) if direction == "forward" else 0,
                    f"from {size} blocks" if size < series.length else "",
                    points=series.points,
                    spread=round(series.spread, 2),
                    disturbed=self._is_disturbed(entrant, series, name, direction),
                )
        return [
            replace(timing, adding=adding[name]) if direction == "backward" and name in adding else timing
            for (name, direction), timing in found.items()
        ]

    def _is_disturbed(self, entrant: Entrant, series: Series, name: str, direction: str) -> bool:
        """Whether it may be faster than that in peace. Who is far behind would not win by it."""
        most = self.most.get((name, direction), math.inf)
        if entrant.is_shared:  # threads that find a core each are no slower than one
            alone = (
                s.seconds for e in self.entrants for (_, of), s in e.series.items() if e.is_alone and of == direction
            )
            most = min(most, *(_NO_SLOWER * seconds + _TEAM_SECONDS for seconds in alone), math.inf)
        alive = [each for each in self.entrants if not each.is_out and (_any_of(each, direction) or each is entrant)]
        if len(alive) < 2 and not entrant.is_out:  # nothing else could be taken
            return False
        return name not in NO_WAYS and ((series.is_disturbed and not entrant.is_out) or series.seconds > most)

    # --- block by block ----------------------------------------------------------------------------------------

    def _block_by_block(self, way: Forward | Backward, direction: str) -> Entrant | None:
        if not self._is_ready(way, direction):
            self._note(way.name, direction, way.failure or "it cannot be called")
            return None
        if way.kind:  # a first call may compile a kernel: what that takes is no part of the budget
            began = time.perf_counter()
            self.make.by(way, direction, 1 if way.scales else self.case.program.length)()
            self.ends += time.perf_counter() - began
        return self.make.simple(way, direction, partial(self.make.by, way, direction), way.scales)

    def _is_ready(self, way: Forward | Backward, direction: str) -> bool:
        began = time.perf_counter()
        is_ready = way.is_ready(direction, self.call.initial, self._wanted if direction == "backward" else None)
        self.ends += time.perf_counter() - began
        return is_ready

    # --- all blocks at once ---------------------------------------------------------------------------------

    def _iterating(self, way: Forward | Backward, direction: str, least: float) -> Entrant | None:
        best = self._best(direction)
        expected = self._expected(least, direction)
        if time.perf_counter() + 2 * expected > self.ends:
            self._note(
                way.name, direction, f"some {expected:.2g} s by estimate, which the budget has not", skipped=True
            )
            return None
        if fault := way.fault(self.case.program):
            self._note(way.name, direction, fault)
            return None
        if direction == "backward":
            return self._tried(self.make.simple(way, direction, partial(self.make.by, way, direction)), best)
        assert isinstance(way, Forward)
        return self._queued(way, best) if way.queues else self._iterative(way, best)

    def _expected(self, least: float, direction: str) -> float:
        """What a way takes that takes `least` at the least, as far off as others are that were timed."""
        bounds = {way.name: way.bounds(self.case, direction)[0] for way in candidates(self.case, direction)[0]}
        found = {name: one.seconds for e in self.entrants for (name, of), one in e.series.items() if of == direction}
        return least * max((found[name] / bounds[name] for name in found if bounds.get(name)), default=1.0)

    def _iterative(self, way: Forward, best: float) -> Entrant | None:
        program, settings = self.case.program, self.settings
        solve = partial(way.solve, program, self.call)
        each = once(partial(solve, replace(settings, max_iterations=2)), self.call.initial.device) / 2
        # No more than a way could take that is not much slower than the best, nor than there is time for.
        window = way.window or program.length
        limit = replace(settings, window=window).limit(way.solver, program.length)
        affordable = math.floor(min(HOPELESS * best, (self.ends - time.perf_counter()) / 2) / each)
        if affordable < _FEWEST_ITERATIONS:
            self._note(way.name, "forward", f"at least {1e3 * _FEWEST_ITERATIONS * each:.2g} ms, from two iterations")
            return None
        if affordable < limit:
            windows = math.ceil(program.length / window)
            settings = replace(settings, max_iterations=max(1, affordable // windows))
        stats = solve(settings).stats
        if stats.outcome is Outcome.ITERATION_LIMIT and affordable < limit:
            note = f"not solved after {stats.iterations} iterations and {1e3 * each * stats.iterations:.2g} ms"
            self._note(way.name, "forward", note)
            return None
        return self._converging(way, partial(solve, settings), stats)

    def _queued(self, way: Forward, best: float) -> Entrant | None:
        run: Callable[[], Solution] = partial(way.solve, self.case.program, self.call, self.settings)
        began = time.perf_counter()
        run()  # which may compile kernels
        self.ends += time.perf_counter() - began
        queued = run().queued
        assert queued is not None, "what iterates in a queue says there how it went"
        outcome, iterations = (int(value) for value in queued[:, :2].amax(0).tolist())
        return self._converging(way, run, SolveStats(list(Outcome)[outcome], iterations))

    def _converging(self, way: Forward, run: Callable[[], Any], stats: SolveStats) -> Entrant | None:
        """An iteration that ended so, if it is any use."""
        if not stats.outcome.success:
            self._note(way.name, "forward", f"{stats.outcome} ({stats.iterations} iterations)")
            return None
        self.iterations[way.name] = stats.iterations
        return self._tried(self.make.simple(way, "forward", lambda _: run), self._best("forward"))

    def _tried(self, entrant: Entrant, best: float) -> Entrant:
        """What was called once on all blocks, which may be long: it is out where it is far behind."""
        entrant.is_out = all(one.seconds > HOPELESS * best for one in entrant.series.values())
        return entrant


def _any_of(entrant: Entrant, direction: str) -> bool:
    return any(_prize(thing) == direction for thing in entrant.series)


def _prize(thing: tuple[str, str]) -> str | None:
    """What something competes for."""
    name, direction = thing
    return None if name in NO_WAYS or direction == ADDING else direction


def _in_words(error: Exception) -> str:
    """Why something could not be timed."""
    if is_out_of_memory(error):
        return "out of memory"
    log.debug("it could not be timed", exc_info=error)
    lines = str(error).strip().splitlines()
    return f"it raised {type(error).__name__}" + (f": {lines[0]}" if lines else "")
