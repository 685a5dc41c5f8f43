"""A whole chain, or a window of it, solved by iteration: Newton's method and its cheaper relatives.

F(z)_l = z_l - f_l(z_{l-1}) = 0 for all l at once. Each iteration evaluates all blocks of the window on the states there
are, and solves one linear system for the correction (see `linearisation.py`). Solving for the correction, and not for
the new state, keeps the rounding of the reduction relative to the correction, which vanishes at the solution.

A window is K blocks. Once the first blocks of it are solved they are left as they are, and the window moves on to the
first that is not: at least one block an iteration, since the first block starts from a state that is right already. A
whole chain is a window of L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pcr_fx.body import Program
from pcr_fx.call import Call
from pcr_fx.solvers.linearisation import Full, Linearisation, linearisation
from pcr_fx.stopping import PATIENCE, STALLED, Outcome, Patience, SolveStats, rounding_level, smallest_scale

# The default tolerance, in units of the dtype's epsilon: as accurate as evaluating the layer in floating point.
DEFAULT_TOLERANCE_EPS = 4.0
# Damped by a half, a solve gets twice as many iterations, and twice the patience; however little is left of a
# correction, at most so many times as many.
MOST_STRETCHED = 32.0
# Sweeps of Picard's iteration before any other where `start="picard"`.
PICARD_SWEEPS = 2


@dataclass(frozen=True)
class Settings:
    """How to iterate: as in `pcr_fx.Options`, with the defaults filled in.

    Attributes:
        tolerance: relative (see `Options.tolerance`).
        max_iterations: for a window's length of blocks; `None` for the solver's own.
        window: K, or `None` for the whole chain at once.
    """

    tolerance: float
    max_iterations: int | None = None
    linear_solver: str = "auto"
    damping: float = 1.0
    window: int | None = None
    start: str = "repeat"
    probes: int | None = None

    def limit(self, solver: str, length: int) -> int:
        """Iterations before a solve of `length` blocks is given up."""
        window = min(self.window or length, length)
        each = self.max_iterations
        if each is None:
            # State l is right after l iterations at the latest. A window that moves on by less than two blocks an
            # iteration is of no use.
            enough = window if window == length else max(4, window // 2)
            each = math.ceil(min(linearisation(solver).most, enough) * self.stretch)
        return each * math.ceil(length / window)

    @property
    def stretch(self) -> float:
        """How many times as many iterations as undamped ones damped ones may take."""
        return min(1 / self.damping, MOST_STRETCHED)


def default_tolerance(dtype: torch.dtype) -> float:
    """A few roundings of `dtype`."""
    return DEFAULT_TOLERANCE_EPS * torch.finfo(dtype).eps


def solve_iteratively(
    program: Program, call: Call, solver: str, settings: Settings, start: Tensor | None = None
) -> tuple[Tensor, SolveStats]:
    """The trajectory `[L, *batch, d]`.

    Args:
        solver: one of `ITERATIVE_SOLVERS`.
        start: a trajectory to start from; without one the initial state is repeated.

    Returns:
        The trajectory, and how it went. The residual is that of the trajectory returned, measured after the last
        correction. Whether it succeeded is `stats.outcome.success`; the trajectory of a failed solve is not to be used.
    """
    states = _repeated(call.initial, program.length)
    if call.initial.numel() == 0:
        return states[1:], SolveStats(Outcome.CONVERGED)
    if start is not None:
        states[1:] = start
    solve = _Solve(program, states, call, linearisation(solver, settings.probes), settings)
    solve.filled = start is not None
    return solve.run()


def _repeated(initial: Tensor, length: int) -> Tensor:
    return initial.unsqueeze(0).repeat(length + 1, *(1 for _ in initial.shape))


@dataclass
class _Look:
    """What one evaluation of a window showed, of its blocks that were not solved before.

    Attributes:
        solved: leading blocks of the window that are solved.
        residual: the largest relative residual; of the solved ones apart.
    """

    solved: int
    residual: float
    residual_solved: float


class _Solve:
    """One solve under way.

    Attributes:
        states: `[L+1, *batch, d]`, which starts with the initial state.
        first: blocks that are solved for good, all before the rest; without a window those are none, or all.
        reached: leading blocks within the tolerance.
        filled: whether states that no window has reached yet are worth starting from.
    """

    def __init__(
        self,
        program: Program,
        states: Tensor,
        call: Call,
        kind: Linearisation,
        settings: Settings,
    ) -> None:
        self.length = program.length
        self.window = min(settings.window or self.length, self.length)
        self.program = program.of_length(self.window)
        self.states, self.call, self.shared = states, call, call.shared
        self.kind, self.settings = kind, settings
        self.limit = settings.limit(kind.solver, self.length)
        self.first, self.reached, self.iteration = 0, 0, 0
        self.filled, self.was_reset = False, False
        self.residual, self.worst_solved = math.inf, 0.0
        self.rounding = False
        self.patience = Patience(PATIENCE * settings.stretch)
        self.reached_at_progress = 0

    def run(self) -> tuple[Tensor, SolveStats]:
        if self.settings.start == "picard" and self.kind.solver != "picard" and not self.filled:
            self._sweep()
        while True:
            outcome = self._iterate()
            if outcome is not None:
                residual = self.worst_solved if outcome.success else self.residual
                return self.states[1:], SolveStats(outcome, self.iteration, residual)

    def _sweep(self) -> None:
        """Picard's iteration, a few times on the first window."""
        picard = linearisation("picard")
        for _ in range(PICARD_SWEEPS):
            previous, current, operands = self._windowed(0)
            values, _ = picard.linearise(self.program, previous, operands, self.shared)
            current.add_(picard.correct(None, values - current, self.settings.linear_solver))
            self.iteration += 1

    def _windowed(self, begin: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The states that the window's blocks start from, those that they should compute, and their operands."""
        end = begin + self.window
        return self.states[begin:end], self.states[begin + 1 : end + 1], self.call.window(begin, end)

    def _iterate(self) -> Outcome | None:
        """Evaluate the window and correct it; or how the solve has ended."""
        begin = min(self.first, self.length - self.window)
        previous, current, operands = self._windowed(begin)
        # Newton squares its error: this is most likely the solution, so look before building Jacobians.
        expected = self.kind.solver == Full.solver and self.residual * self.residual < self.settings.tolerance
        matrices: Tensor | None = None
        if expected:
            values = self.program.evaluate(previous, *operands, *self.shared)
        else:
            values, matrices = self.kind.linearise(self.program, previous, operands, self.shared)
        residuals = values - current
        look = self._look(residuals, current.abs())
        if expected and look.solved < self.window:
            _, matrices = self.kind.linearise(self.program, previous, operands, self.shared)
        if look.solved < self.window and math.isfinite(look.residual):
            look = self._look_at_terms(look, residuals, previous, current, matrices, expected)
        self.reached = begin + look.solved
        if self.window < self.length or self.reached == self.length:
            self.first, self.worst_solved = self.reached, max(self.worst_solved, look.residual_solved)
        if self.first == self.length:
            return Outcome.ROUNDING if self.rounding else Outcome.CONVERGED
        failure = self._failure(look)
        self.residual = look.residual
        if failure is None and math.isfinite(look.residual):
            self._correct(matrices, residuals, values, begin)
        self.iteration += 1
        return failure

    def _look(self, residuals: Tensor, scale: Tensor, factor: float = 1.0) -> _Look:
        """Which leading blocks of the window are within `factor` tolerances, relative to `scale`."""
        ratios = relative_residuals(residuals, scale, self.program.layout.counts)
        ratios[: self.first - min(self.first, self.length - self.window)] = 0  # solved before
        within = (ratios <= factor * self.settings.tolerance).cumprod(0)
        solved_ratios = torch.where(within > 0, ratios, 0)
        numbers = torch.stack([within.sum().to(ratios.dtype), ratios.max(), solved_ratios.max()])
        solved, residual, residual_solved = numbers.tolist()
        return _Look(int(solved), residual, residual_solved)

    def _look_at_terms(
        self,
        look: _Look,
        residuals: Tensor,
        previous: Tensor,
        current: Tensor,
        matrices: Tensor | None,
        expected: bool,
    ) -> _Look:
        """Where no more is to be gained: relative to the terms that may have cancelled in a state as well.

        That is |J| |z_{l-1}|, which rounding the block's input multiplies; or |z_{l-1}| where no J is at hand.
        """
        stalled = look.residual > STALLED * self.residual
        rounding = rounding_level(residuals.dtype)
        if self.kind.solver == Full.solver and matrices is not None and (expected or stalled):
            scale = current.abs() + (matrices.abs() @ previous.abs().unsqueeze(-1)).squeeze(-1)
            scale.masked_fill_(scale.isinf(), math.nan)  # nothing is small because a product overflowed
        elif stalled and look.residual <= 8 * rounding:
            scale = current.abs() + previous.abs()
        else:
            return look
        nearer = self._look(residuals, scale)
        if stalled and nearer.solved < self.window:
            rounded = self._look(residuals, scale, rounding / self.settings.tolerance)
            if rounded.solved == self.window:
                self.rounding = True
                return rounded
        nearer.residual = look.residual if nearer.solved < self.window else nearer.residual
        return nearer

    def _failure(self, look: _Look) -> Outcome | None:
        """Why to give up now, if there is a reason."""
        if not math.isfinite(look.residual):
            return None if self._reset() else Outcome.NON_FINITE
        self.was_reset = False
        if self.iteration >= self.limit:
            return Outcome.ITERATION_LIMIT
        # Until a first window is solved there is nothing to tell from where it has got to.
        lag = 0 if self.window == self.length else self.limit * self.window / self.length
        on_its_way = self.iteration > 0 and self.reached * self.limit >= self.length * (self.iteration - lag)
        if self.patience.is_over(self.iteration, look.residual, on_its_way):
            # Blocks are solved one by one, but too few an iteration to end within the limit.
            return Outcome.ITERATION_LIMIT if self.reached > self.reached_at_progress else Outcome.STAGNATED
        if self.patience.progressed_at == self.iteration:
            self.reached_at_progress = self.reached
        return None

    def _reset(self) -> bool:
        """Start a window anew from its last solved state; whether that gains anything."""
        if self.window == self.length or self.was_reset:
            return False
        self.states[self.first + 1 :] = self.states[self.first]
        self.was_reset = True
        return True

    def _correct(self, matrices: Tensor | None, residuals: Tensor, values: Tensor, begin: int) -> None:
        end, solved = begin + self.window, self.first - begin
        if solved == self.window:  # it moves on as a whole
            self._fill(end)
            return
        # What is solved stays as it is, and asks for no correction of what is behind it.
        residuals[:solved] = 0
        delta = self.kind.correct(matrices, residuals, self.settings.linear_solver)
        self.states[begin + 1 : end + 1].add_(delta, alpha=self.settings.damping)
        # Its input is right, and so is this: however far off the state was, and whatever the damping.
        self.states[self.first + 1] = values[solved]
        self._fill(end)

    def _fill(self, end: int) -> None:
        """Start the blocks that the next window adds, all behind state `end`, from that state."""
        if not self.filled:
            self.states[end + 1 : self.first + self.window + 1] = self.states[end]


def relative_residuals(residuals: Tensor, scale: Tensor, counts: Sequence[int]) -> Tensor:
    """The largest residual of each block, relative to the size of what it computes, `[L]`.

    Args:
        residuals: r, `[L, *batch, d]`.
        scale: the size that each is relative to, of the same shape.
        counts: how d is made up, the numbers of each carried tensor: each has its own scale, as has each sample.
    """
    floor = smallest_scale(scale.dtype)
    parts = zip(residuals.abs().split(list(counts), -1), scale.split(list(counts), -1), strict=True)
    ratios = [(r.amax(-1) / s.amax(-1).clamp_min(floor)) for r, s in parts if s.shape[-1]]
    worst = ratios[0] if len(ratios) == 1 else torch.stack(ratios).amax(0)
    return worst.flatten(1).amax(1) if worst.ndim > 1 else worst
