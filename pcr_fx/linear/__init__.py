"""Block-bidiagonal linear systems: x_l = A_l x_{l-1} + b_l for all blocks l at once, and the transposed system."""

from pcr_fx.linear.recurrence import LINEAR_SOLVERS, sequential_depth, solve_recurrence, solve_transposed

__all__ = ["LINEAR_SOLVERS", "sequential_depth", "solve_recurrence", "solve_transposed"]
