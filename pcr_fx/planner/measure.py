"""What the ways through a chain cost, measured on the tensors at hand."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pcr_fx.call import Call
from pcr_fx.planner.choice import BESIDE, HANDING, STACKING, Timing
from pcr_fx.solvers import Outcome, Settings, SolveStats, blocks
from pcr_fx.ways import EAGER, Backward, Case, Forward, Solution, candidates

log = logging.getLogger(__name__)

# What a solve node costs beside its solver, in seconds a call, more than a model's modules cost beside their ops. On a
# CPU, chains of 4 to 16 blocks: 4 us forward, 30 to 80 us in a training step.
NODE_SECONDS = {"forward": 5e-6, "backward": 5e-5}
# Calls are timed until they took as long as this, or so many were made.
_ENOUGH_SECONDS = 0.1
_MOST_REPEATS = 7
# A share of the budget that one call may take; what goes block by block is timed on fewer blocks otherwise.
_CALL_SHARE = 0.1
_FEWEST_BLOCKS = 16
# Iterations that no solver does without, and numbers in all states of a chain that one is tried on unseen.
_FEWEST_ITERATIONS = 2
_NUMBERS_TRIED = 2**20
# How many times slower than the best a solver may turn out before it is given up.
_HOPELESS = 3.0
# How much slower than the best what is timed a second time may be; rounds of that, and the share of the budget they may
# take: enough that another program's burst of work does not last through them all.
_CLOSE = 1.25
_REMATCH_ROUNDS = 25
_REMATCH_SHARE = 0.25
# Calls shorter than this are made twice in a rematch, and the second counts: the first finds the caches full of others'.
_SHORT_SECONDS = 0.02


@dataclass(frozen=True)
class _Run:
    """How something was timed: the call, how many times more blocks there are, and what a node costs beside it."""

    call: Callable[[], Any]
    scale: float
    fixed: float

    def seconds(self, measured: float) -> float:
        """Of all blocks."""
        return self.scale * measured + self.fixed


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
    with _uncollected:
        return _Measurement(case, settings, call, needs_gradient, are_stacked, with_eager).run()


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
        self.case, self.settings, self.are_stacked = case, settings, are_stacked
        operands, shared = ([tensor.detach() for tensor in group] for group in (call.operands, call.shared))
        self.call = call._replace(initial=call.initial.detach(), operands=operands, shared=shared)
        self.needs_gradient, self.with_eager = needs_gradient, with_eager
        self.budget = case.options.planning_budget
        self.ends = time.perf_counter() + self.budget
        self.timings: list[Timing] = []
        self.runs: dict[tuple[str, str], _Run] = {}

    def run(self) -> tuple[Timing, ...]:
        # Where gradients are needed the model's own forward records them.
        if self.with_eager:
            self._beside(EAGER, self._eager)
        directions = ("forward", "backward") if self.needs_gradient else ("forward",)
        ways = {direction: self._candidates(direction) for direction in directions}
        # Block by block first: those are sure to end, and rule out others.
        self._measure_all(ways, lambda way: not way.iterates)
        if self.are_stacked:
            self._beside(STACKING, self._stacking)
        self._measure_all(ways, lambda way: way.iterates)
        self._rematch()
        for timing in self.timings:
            log.info("chain of %d blocks, %s: %s", self.case.program.length, timing.direction, timing)
        return tuple(self.timings)

    def _candidates(self, direction: str) -> list[Forward | Backward]:
        ways, refused = candidates(self.case, direction)
        self.timings += [Timing(none.name, direction, None, note=none.reason) for none in refused]
        return ways

    def _measure_all(
        self, ways: dict[str, list[Forward | Backward]], which: Callable[[Forward | Backward], bool]
    ) -> None:
        for direction, all_of in ways.items():
            self._measure([way for way in all_of if which(way)], direction)

    def _measure(self, ways: Sequence[Forward | Backward], direction: str) -> None:
        estimates = {way: way.bounds(self.case, direction) for way in ways}
        measured = [s for (way, of), s in self._seconds().items() if of == direction and way not in BESIDE]
        best = min([*measured, *(most for _, most in estimates.values())], default=math.inf)
        # What is likely to be fast comes first.
        for way in sorted(ways, key=lambda way: estimates[way][1]):
            timing = self._way(way, direction, best, estimates[way][0])
            best = best if timing.seconds is None else min(best, timing.seconds)
            self.timings.append(timing)

    def _seconds(self) -> dict[tuple[str, str], float]:
        return {(t.way, t.direction): t.seconds for t in self.timings if t.seconds is not None}

    def _way(self, way: Forward | Backward, direction: str, best: float, least: float) -> Timing:
        if least > best:
            return Timing(way.name, direction, None, note=f"at least {1e3 * least:.2g} ms by estimate")
        if time.perf_counter() > self.ends:
            return Timing(way.name, direction, None, note=f"the budget of {self.budget:g} s was spent", skipped=True)
        try:
            if fault := way.fault(self.case.program):
                return Timing(way.name, direction, None, note=fault)
            if not way.iterates:
                return self._sequential(way, direction)
            if direction == "backward":
                run = self._by(way, direction, self.case.program.length)
                return self._timing(way.name, direction, run, best=best)
            assert isinstance(way, Forward)
            return self._queued(way, best) if way.queues else self._iterative(way, best)
        except Exception as error:
            return Timing(way.name, direction, None, note=_in_words(error))

    def _beside(self, name: str, take: Callable[[], None]) -> None:
        """Time what is no way of a solve node, if it can be called."""
        try:
            take()
        except Exception as error:
            self.timings.append(Timing(name, "forward", None, note=_in_words(error)))

    # --- block by block: the time of fewer blocks, in proportion ------------------------------------------

    def _eager(self) -> None:
        count = self._count(self._eager_forward, 2 if not self.needs_gradient else 8)
        forward = self._eager_forward(count)
        self.timings.append(self._timing(EAGER, "forward", forward, count))
        if self.needs_gradient:
            out, inputs = forward()
            moved = [one for one in out if one.requires_grad]
            if moved:
                ones = [torch.ones_like(one) for one in moved]
                backward = partial(torch.autograd.grad, moved, inputs, ones, retain_graph=True, allow_unused=True)
                self.timings.append(self._timing(EAGER, "backward", backward, count))

    def _eager_forward(self, count: int) -> Callable[[], tuple[Any, list[Tensor]]]:
        program, call = self.case.program, self.call.first(count)
        each = [tuple(self._leaf(part) for part in block) for block in blocks(call.operands, count)]
        states = [self._leaf(state) for state in program.layout.unflatten(call.initial)]
        shared = [self._leaf(tensor) for tensor in call.shared]
        inputs = [t for group in (states, shared, *each) for t in group if t.requires_grad]

        def run() -> tuple[Any, list[Tensor]]:
            present: Any = states
            with torch.set_grad_enabled(self.needs_gradient):
                for block in each:
                    present = program.chain.body(*present, *block, *shared)
            return present, inputs

        return run

    def _stacking(self) -> None:
        """What it costs that operands are the blocks' own tensors, beside any solver.

        In proportion, but to enough of them that their memory is new at every call, as that of all would be.
        """
        count = self._count(lambda count: self._stacked(count)[0], 2)
        run, parts = self._stacked(count)
        self.timings.append(self._timing(STACKING, "forward", run, count))
        outputs = [operand for operand in run() if operand.requires_grad]
        if outputs:
            leaves = [part for operand in parts for part in operand if part.requires_grad]
            gradients = [torch.ones_like(operand) for operand in outputs]
            handing = partial(torch.autograd.grad, outputs, leaves, gradients, retain_graph=True)
            self.timings.append(self._timing(HANDING, "backward", handing, count))

    def _stacked(self, count: int) -> tuple[Callable[[], list[Tensor]], list[list[Tensor]]]:
        """What stacks the operands of so many blocks, and these."""
        parts = [[self._leaf(part) for part in operand.unbind(0)] for operand in self.call.first(count).operands]

        def run() -> list[Tensor]:
            with torch.set_grad_enabled(self.needs_gradient):
                return [torch.stack(part) for part in parts]

        return run, parts

    def _leaf(self, tensor: Tensor) -> Tensor:
        # An inference tensor's copy is none.
        plain = tensor.clone() if tensor.is_inference() else tensor.detach()
        return plain.requires_grad_(self.needs_gradient and tensor.is_floating_point())

    def _sequential(self, way: Forward | Backward, direction: str) -> Timing:
        if not self._is_ready(way, direction):
            return Timing(way.name, direction, None, note=way.failure or "it cannot be called")
        length = self.case.program.length
        make = partial(self._by, way, direction)
        self._compile(partial(make, min(2, length) if way.scales else length))
        # Several calls have to fit: the first with memory that the machine had not used yet take ten times as long.
        count = self._count(make, 4) if way.scales else length
        return self._timing(way.name, direction, make(count), count)

    def _compile(self, make: Callable[[], Callable[[], Any]]) -> None:
        """A first call, which may compile a kernel: what that takes is no part of the budget."""
        began = time.perf_counter()
        make()()
        self.ends += time.perf_counter() - began

    def _is_ready(self, way: Forward | Backward, direction: str) -> bool:
        began = time.perf_counter()
        is_ready = way.is_ready(direction, self.call.initial)
        self.ends += time.perf_counter() - began
        return is_ready

    def _by(self, way: Forward | Backward, direction: str, count: int) -> Callable[[], Any]:
        """What goes by a way through the first `count` blocks."""
        call = self.call if count == self.call.length else self.call.first(count)
        if direction == "forward":
            assert isinstance(way, Forward)
            return partial(way.solve, self.case.program, call, self.settings)
        assert isinstance(way, Backward)
        trajectory = call.initial.unsqueeze(0).repeat(count, *(1 for _ in call.initial.shape))
        ones = torch.ones_like(trajectory)
        return partial(way.solve_adjoint, self.case.program, call, trajectory, ones, self.settings)

    def _count(self, make: Callable[[int], Callable[[], Any]], times: int) -> int:
        """Blocks to time: all, or as many as take less than a share of the budget, of which there are so many `times`."""
        length = self.case.program.length
        count = min(length, _FEWEST_BLOCKS)
        while count < length:
            run, more = make(count), min(length, 4 * count)
            run()
            expected = more / count * _once(run, self.call.initial.device)
            if times * expected > _CALL_SHARE * self.budget:
                break
            count = more
        return count

    # --- all blocks at once ---------------------------------------------------------------------------------

    def _iterative(self, way: Forward, best: float) -> Timing:
        least = self._least_seconds(way)
        if least > _HOPELESS * best:
            return Timing(way.name, "forward", None, note=f"at least {1e3 * least:.2g} ms, from a part of the blocks")
        program, settings = self.case.program, self.settings
        solve = partial(way.solve, program, self.call)
        each = self._seconds_an_iteration(solve)
        # No more than a way could take that is not much slower than the best.
        window = way.window or program.length
        limit = replace(settings, window=window).limit(way.solver, program.length)
        affordable = math.ceil(_HOPELESS * best / each)
        if affordable < limit:
            windows = math.ceil(program.length / window)
            settings = replace(settings, max_iterations=max(1, affordable // windows))
        stats = solve(settings).stats
        if stats.outcome is Outcome.ITERATION_LIMIT and affordable < limit:
            note = f"not solved after {stats.iterations} iterations and {1e3 * each * stats.iterations:.2g} ms"
            return Timing(way.name, "forward", None, note=note)
        return self._converging(way, partial(solve, settings), stats, best)

    def _queued(self, way: Forward, best: float) -> Timing:
        run: Callable[[], Solution] = partial(way.solve, self.case.program, self.call, self.settings)
        self._compile(lambda: run)
        queued = run().queued
        assert queued is not None, "what iterates in a queue says there how it went"
        outcome, iterations = (int(value) for value in queued[:, :2].amax(0).tolist())
        return self._converging(way, run, SolveStats(list(Outcome)[outcome], iterations), best)

    def _converging(self, way: Forward, run: Callable[[], Any], stats: SolveStats, best: float) -> Timing:
        """The time of an iteration that ended so, if it is any use."""
        if not stats.outcome.success:
            return Timing(way.name, "forward", None, note=f"{stats.outcome} ({stats.iterations} iterations)")
        return self._timing(way.name, "forward", run, best=best, iterations=stats.iterations)

    def _least_seconds(self, way: Forward) -> float:
        """What a few iterations of a chain take that is too large to try one of: from so many blocks as can be tried."""
        program, samples = self.case.program, max(self.case.samples, 1)
        count = _NUMBERS_TRIED // (samples * program.dimension)
        if not _FEWEST_BLOCKS <= count < (way.window or program.length):
            return 0.0
        solve = partial(way.solve, program.of_length(count), self.call.first(count))
        return _FEWEST_ITERATIONS * self._seconds_an_iteration(solve) * program.length / count

    def _seconds_an_iteration(self, solve: Callable[[Settings], Any]) -> float:
        run = partial(solve, replace(self.settings, max_iterations=2))
        self._compile(lambda: run)
        return _once(run, self.call.initial.device) / 2

    # --- the clock --------------------------------------------------------------------------------------------

    def _timing(
        self,
        way: str,
        direction: str,
        run: Callable[[], Any],
        count: int | None = None,
        best: float = math.inf,
        iterations: int = 0,
    ) -> Timing:
        """The time of all blocks, in proportion to `run`, which goes through `count` of them."""
        length = self.case.program.length
        count = count or length
        fixed = 0.0 if way in (EAGER, *BESIDE) else NODE_SECONDS[direction]
        self.runs[way, direction] = call = _Run(run, length / count, fixed)
        note = f"from {count} blocks" if count < length else ""
        return Timing(way, direction, call.seconds(self._timed(run, best)), iterations, note)

    def _rematch(self) -> None:
        """Time in turn what came out close: measured one after another, two differ by what else the machine did."""
        close = self._close()
        times: dict[tuple[str, str], list[float]] = {key: [] for key in close}
        until = time.perf_counter() + _REMATCH_SHARE * self.budget
        for _ in range(_REMATCH_ROUNDS if len(close) > 1 else 0):
            for key in close:
                times[key].append(self._again(self.runs[key].call))
            if time.perf_counter() > until:
                break
        for index, timing in enumerate(self.timings):
            if again := times.get((timing.way, timing.direction)):
                seconds = self.runs[timing.way, timing.direction].seconds(statistics.median(again))
                self.timings[index] = replace(timing, seconds=seconds)

    def _again(self, run: Callable[[], Any]) -> float:
        seconds = _once(run, self.call.initial.device)
        return seconds if seconds > _SHORT_SECONDS else _once(run, self.call.initial.device)

    def _close(self) -> list[tuple[str, str]]:
        """What the choice hangs on: the ways near the best of a direction, and eager where the sums are near."""
        seconds = self._seconds()
        stacking = seconds.pop((STACKING, "forward"), 0.0)
        handing = seconds.pop((HANDING, "backward"), 0.0)
        eager = {key: seconds.pop(key) for key in list(seconds) if key[0] == EAGER}
        best: dict[str, float] = {}
        for (_, direction), each in seconds.items():
            best[direction] = min(each, best.get(direction, math.inf))
        close = [key for key, each in seconds.items() if each <= _CLOSE * best[key[1]]]
        least, sums = sum(best.values()) + handing, sum(eager.values())
        if eager and least <= _CLOSE * sums and sums <= _CLOSE * (least + stacking):
            return [*eager, *close]
        return close if len(close) > len(best) else []

    def _timed(self, run: Callable[[], Any], best: float = float("inf")) -> float:
        """The median time of a call, after one to warm up; one that is far from the best is not made again.

        The first is slower than others, unless something disturbed those.
        """
        device = self.call.initial.device
        first, times = _once(run, device), [_once(run, device)]
        while len(times) < _MOST_REPEATS and sum(times) < _ENOUGH_SECONDS and times[0] < _HOPELESS * best:
            times.append(_once(run, device))
        return min(first, statistics.median(times))


def _in_words(error: Exception) -> str:
    """Why something could not be timed. Where memory ran out PyTorch has no exception of its own for it on a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return "out of memory"
    log.debug("it could not be timed", exc_info=error)
    lines = str(error).strip().splitlines()
    return f"it raised {type(error).__name__}" + (f": {lines[0]}" if lines else "")


def _once(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
