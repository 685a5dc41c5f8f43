"""Solvers of a chain and of its adjoint, and what they say of how it went."""

from pcr_fx.solvers.adjoint import adjoint_sequential, adjoint_transposed
from pcr_fx.solvers.newton import Newton, solve_newton
from pcr_fx.solvers.outcome import Outcome, SolveStats
from pcr_fx.solvers.sequential import blocks, solve_sequential

__all__ = [
    "Newton",
    "Outcome",
    "SolveStats",
    "adjoint_sequential",
    "adjoint_transposed",
    "blocks",
    "solve_newton",
    "solve_sequential",
]
