"""When an iteration ends, and how: one rule for PyTorch's ops and for the kernels of every target.

After each evaluation of the blocks, with r_l = f_l(z_{l-1}) - z_l and all residuals relative (to what the block
computes, `|z_l|`, if nothing else is said), the first of these that holds:

1. A residual is not finite: `NON_FINITE`.
2. The residual is within the tolerance: `CONVERGED`.
3. It stalls, or Newton's method, which squares its error, was to have converged; and relative to the terms that may
   have cancelled in a state, `|z_l| + |J_l| |z_{l-1}|`, it is within the tolerance: `CONVERGED`.
4. It stalls, and relative to the terms it is a few roundings: `ROUNDING`. That is the best that the dtype can do.
5. There are no iterations left: `ITERATION_LIMIT`.
6. There was no progress for `PATIENCE` iterations: `STAGNATED`.

Progress is a residual a tenth below the one that was progress last. Residuals may rise for long before the quadratic phase, while
blocks are solved one by one from the front. So where a solver counts those, it is progress too if enough are solved to
end within the limit: what moves on in windows, or has no derivatives, falls block by block and not by its residual.
Newton's kernels do not count them, since hardly a chain depends on it (see `benchmarks/results/stopping.md`, which
also says where the numbers come from).
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch

# A residual stalls if it is above this share of the one before.
STALLED = 0.5
# A residual is progress if it is below this share of the one that was progress last.
PROGRESS = 0.9
# Iterations without progress before a solve is given up.
PATIENCE = 12
# Roundings that a stalled residual may be.
ROUNDING_EPS = 8.0
# Roundings that the residual of an adjoint may be, relative to the adjoints around its block. A loop leaves about one.
ADJOINT_EPS = 32.0


class Outcome(enum.Enum):
    """How a solve ended, as a sentence for people. Kernels know all but the last, by number."""

    CONVERGED = "the residual is within the tolerance"
    ROUNDING = "the residual stopped falling at the rounding level of the block itself"
    STAGNATED = "the residual stopped falling above the tolerance"
    NON_FINITE = "a state or the residual became infinite or NaN"
    ITERATION_LIMIT = "the iteration limit was reached above the tolerance, or would have been"
    SEQUENTIAL = "evaluated block by block"

    @property
    def number(self) -> int:
        """Its place in this list. Of those that kernels know, failures come after successes."""
        return list(Outcome).index(self)

    @property
    def success(self) -> bool:
        """Whether the trajectory may be returned as it is."""
        return self in (Outcome.CONVERGED, Outcome.ROUNDING, Outcome.SEQUENTIAL)

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class SolveStats:
    """One solve.

    Attributes:
        outcome: how it ended.
        iterations: linear systems solved; 0 for a sequential evaluation.
        residual: the largest `|z_l - f_l(z_{l-1})|` of the returned trajectory, relative as `Options.tolerance` is;
            0 for a sequential evaluation, which computes each state from the one before.
        fallback: what failed before, where the result was evaluated sequentially instead.
    """

    outcome: Outcome
    iterations: int = 0
    residual: float = 0.0
    fallback: Outcome | None = None


@dataclass
class Patience:
    """Keeps watch over the progress of one solve.

    Attributes:
        limit: iterations without progress before it is over.
        share: of the residual that was progress last, below which another is.
        smallest: the residual that was progress last.
        progressed_at: the iteration that it was found in.
    """

    limit: float = PATIENCE
    share: float = PROGRESS
    smallest: float = math.inf
    progressed_at: int = 0

    def is_over(self, iteration: int, residual: float, on_its_way: bool = False) -> bool:
        """Take in an iteration, and tell whether to give up.

        Args:
            on_its_way: whether enough blocks are solved to end within the limit.
        """
        if residual <= self.share * self.smallest or on_its_way:
            self.smallest, self.progressed_at = min(self.smallest, residual), iteration
        return iteration - self.progressed_at >= self.limit


def rounding_level(dtype: torch.dtype) -> float:
    """The relative residual, to the terms of a block, of a solve that ends with `ROUNDING`."""
    return ROUNDING_EPS * torch.finfo(dtype).eps


def smallest_scale(dtype: torch.dtype) -> float:
    """Below this scale a relative residual would only measure denormal noise."""
    return torch.finfo(dtype).tiny / torch.finfo(dtype).eps


def adjoint_tolerance(dtype: torch.dtype) -> float:
    """The relative residual of an adjoint that is accepted."""
    return ADJOINT_EPS * torch.finfo(dtype).eps
