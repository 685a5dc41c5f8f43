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
from pcr_fx.kernels import ChainKernel
from pcr_fx.linear import solve_recurrence
from pcr_fx.solvers.outcome import Outcome, SolveStats

# The default tolerance, in units of the dtype's epsilon: as accurate as evaluating the layer in floating point.
DEFAULT_TOLERANCE_EPS = 4.0
DEFAULT_MAX_ITERATIONS = 32
# Iterations without a new smallest residual before a solve is given up. Residuals may rise for a while before the
# quadratic phase, so one rise says nothing.
_PATIENCE = 8
# A stalled residual of this many roundings of the block's input and output is the best the dtype can do.
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
    """One trajectory under way: `states` `[L+1, *batch, d]` starts with the initial state.

    `counts` says how d is made up: the numbers of each carried tensor.
    """

    states: Tensor
    counts: list[int]

    @classmethod
    def repeat(cls, initial: Tensor, program: Program) -> _Iterate:
        states = initial.unsqueeze(0).repeat(program.length + 1, *(1 for _ in initial.shape))
        return cls(states, program.layout.counts)

    @property
    def previous(self) -> Tensor:
        return self.states[:-1]

    @property
    def current(self) -> Tensor:
        return self.states[1:]

    def relative(self, residuals: Tensor, jacobians: Tensor | None = None) -> float:
        """The largest residual, relative to the size of what its block computes: the state it returns.

        With `jacobians`, relative to that plus |J| |z_{l-1}|, which rounding the block's input multiplies: terms may
        cancel in the state. Each carried tensor has its own scale, as has each block and sample.
        """
        size = self.current.abs()
        if jacobians is not None:
            size += (jacobians.abs() @ self.previous.abs().unsqueeze(-1)).squeeze(-1)
            size.masked_fill_(size.isinf(), math.nan)  # nothing is small because a product overflowed
        # Below this scale a relative residual would only measure denormal noise.
        floor = torch.finfo(size.dtype).tiny / torch.finfo(size.dtype).eps
        parts = zip(residuals.abs().split(self.counts, -1), size.split(self.counts, -1), strict=True)
        ratios = [(r.amax(-1) / s.amax(-1).clamp_min(floor)).max() for r, s in parts if s.shape[-1]]
        return float(ratios[0] if len(ratios) == 1 else torch.stack(ratios).max())


def solve_newton(
    program: Program,
    initial: Tensor,
    operands: Sequence[Tensor],
    shared: Sequence[Tensor],
    settings: Newton,
    kernel: ChainKernel | None = None,
) -> tuple[Tensor, SolveStats]:
    """The trajectory `[L, *batch, d]` from `initial` `[*batch, d]`, started from `initial` repeated.

    By `kernel` if given, where the linear solver is left to it: there each sample iterates until it has converged
    itself, and linear systems are solved in as many parts as there are threads.

    The residual in the stats is that of the trajectory returned, measured after the last correction. Whether it
    succeeded is `stats.outcome.success`; the trajectory of a failed solve is not to be used.
    """
    iterate = _Iterate.repeat(initial, program)
    if initial.numel() == 0:
        return iterate.current, SolveStats(Outcome.CONVERGED)
    if kernel is not None and settings.linear_solver == "auto" and kernel.is_ready("newton", initial):
        solved = kernel.solve_newton(initial, operands, shared, settings.tolerance, settings.max_iterations)
        trajectory, outcome, iterations, last = solved
        return trajectory, SolveStats(Outcome[outcome], iterations, last)
    residual, best, best_at, iteration = math.inf, math.inf, 0, 0
    while True:
        last, jacobians = residual, None
        # Newton squares its error: this is most likely the solution, so look before building Jacobians.
        expected = last * last < settings.tolerance
        if expected:
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
        if expected or residual > 0.5 * last:
            against_terms = iterate.relative(residuals, jacobians)
            if against_terms <= settings.tolerance:
                return iterate.current, SolveStats(Outcome.CONVERGED, iteration, against_terms)
            if residual > 0.5 * last and against_terms <= _ROUNDING_EPS * torch.finfo(initial.dtype).eps:
                return iterate.current, SolveStats(Outcome.ROUNDING, iteration, against_terms)
        if residual < best:
            best, best_at = residual, iteration
        if iteration == settings.max_iterations:
            return iterate.current, SolveStats(Outcome.ITERATION_LIMIT, iteration, residual)
        if iteration - best_at >= _PATIENCE:
            return iterate.current, SolveStats(Outcome.STAGNATED, iteration, residual)
        iterate.current.add_(solve_recurrence(jacobians, residuals, settings.linear_solver))
        iteration += 1
