"""Newton's method on a whole chain, each linear system solved by a parallel reduction.

F(z)_l = z_l - f_l(z_{l-1}) = 0 for all l at once. The Newton correction solves delta_l = J_l delta_{l-1} + r_l with
r_l = f_l(z_{l-1}) - z_l and delta_0 = 0 (DeepPCR, arXiv 2309.16318, equations 4 to 6). Solving for the correction, and
not for the new state, keeps the rounding of the reduction relative to the correction, which vanishes at the solution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pcr_fx.body import Program
from pcr_fx.linear import solve_recurrence
from pcr_fx.solvers.outcome import Outcome, SolveStats

# The default tolerance, in units of the dtype's epsilon: as accurate as evaluating the layer in floating point.
DEFAULT_TOLERANCE_EPS = 4.0
DEFAULT_MAX_ITERATIONS = 32
# Iterations without a new smallest residual before a solve is given up. Residuals may rise for a while before the
# quadratic phase, so one rise says nothing.
_PATIENCE = 8
# A stalled residual below this many roundings of the block's input and output is the best the dtype can do.
_ROUNDING_EPS = 8.0


@dataclass(frozen=True)
class Newton:
    """How to iterate. `tolerance` is relative (see `Options.tolerance`)."""

    tolerance: float
    max_iterations: int
    linear_solver: str = "auto"

    @classmethod
    def of(
        cls, dtype: torch.dtype, length: int, tolerance: float | None, max_iterations: int | None, linear_solver: str
    ) -> Newton:
        """The settings with the defaults filled in for a chain of `length` blocks in `dtype`."""
        if tolerance is None:
            tolerance = DEFAULT_TOLERANCE_EPS * torch.finfo(dtype).eps
        # Newton is exact after L iterations at the latest: iteration l makes state l right.
        return cls(tolerance, max_iterations or min(length, DEFAULT_MAX_ITERATIONS), linear_solver)


@dataclass
class _Iterate:
    """One trajectory under way: `states` `[L+1, *batch, d]` starts with the initial state."""

    states: Tensor

    @classmethod
    def repeat(cls, initial: Tensor, length: int) -> _Iterate:
        return cls(initial.unsqueeze(0).repeat(length + 1, *(1 for _ in initial.shape)))

    @property
    def previous(self) -> Tensor:
        return self.states[:-1]

    @property
    def current(self) -> Tensor:
        return self.states[1:]

    def relative(self, residuals: Tensor) -> float:
        """The largest residual, relative per block and sample. The one host synchronisation of an iteration."""
        size = self.states.abs().amax(-1)
        # Below this scale a relative residual would only measure denormal noise.
        floor = torch.finfo(size.dtype).tiny / torch.finfo(size.dtype).eps
        scale = torch.maximum(size[:-1], size[1:]).clamp_min(floor)
        return float((residuals.abs().amax(-1) / scale).max())

    def at_rounding_level(self, residuals: Tensor, jacobians: Tensor) -> bool:
        """Whether the residuals are what rounding the block's input and output alone would cause."""
        moved = (jacobians.abs() @ self.previous.abs().unsqueeze(-1)).squeeze(-1)
        level = torch.finfo(moved.dtype).eps * (moved + self.current.abs()).amax(-1, keepdim=True)
        return bool((residuals.abs() <= _ROUNDING_EPS * level).all())


def solve_newton(
    program: Program, initial: Tensor, operands: Sequence[Tensor], shared: Sequence[Tensor], settings: Newton
) -> tuple[Tensor, SolveStats]:
    """The trajectory `[L, *batch, d]` from `initial` `[*batch, d]`, started from `initial` repeated.

    The residual in the stats is that of the trajectory returned, measured after the last correction. Whether it
    succeeded is `stats.outcome.success`; the trajectory of a failed solve is not to be used.
    """
    iterate = _Iterate.repeat(initial, program.length)
    if initial.numel() == 0:
        return iterate.current, SolveStats(Outcome.CONVERGED)
    residual, best, best_at, iteration = math.inf, math.inf, 0, 0
    while True:
        last, jacobians = residual, None
        if last * last < settings.tolerance:
            # Newton squares its error: this is most likely the solution, so look before building Jacobians.
            values = program.evaluate(iterate.previous, *operands, *shared)
        else:
            values, jacobians = program.linearise(iterate.previous, *operands, *shared)
        residuals = values - iterate.current
        residual = iterate.relative(residuals)
        if residual <= settings.tolerance:
            return iterate.current, SolveStats(Outcome.CONVERGED, iteration, residual)
        if not math.isfinite(residual):
            return iterate.current, SolveStats(Outcome.NON_FINITE, iteration, residual)
        if jacobians is None:
            jacobians = program.linearise(iterate.previous, *operands, *shared)[1]
        if residual > 0.5 * last and iterate.at_rounding_level(residuals, jacobians):
            return iterate.current, SolveStats(Outcome.ROUNDING, iteration, residual)
        if residual < best:
            best, best_at = residual, iteration
        if iteration == settings.max_iterations:
            return iterate.current, SolveStats(Outcome.ITERATION_LIMIT, iteration, residual)
        if iteration - best_at >= _PATIENCE:
            return iterate.current, SolveStats(Outcome.STAGNATED, iteration, residual)
        iterate.current.add_(solve_recurrence(jacobians, residuals, settings.linear_solver))
        iteration += 1
