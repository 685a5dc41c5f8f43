"""How a solve ended."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Outcome(enum.Enum):
    """How a solve ended, as a sentence for people. Kernels know the first five, by number."""

    CONVERGED = "the residual is within the tolerance"
    ROUNDING = "the residual stopped falling at the rounding level of the block itself"
    STAGNATED = "the residual stopped falling above the tolerance"
    NON_FINITE = "a state or the residual became infinite or NaN"
    ITERATION_LIMIT = "the iteration limit was reached above the tolerance, or would have been"
    GROWING = "the linearised chain grows so fast that no digit of a correction is right"
    SEQUENTIAL = "evaluated block by block"

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
