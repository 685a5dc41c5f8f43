"""Solvers of a chain and of its adjoint, and what they say of how it went."""

from pcr_fx.solvers.adjoint import adjoint_sequential, adjoint_transposed
from pcr_fx.solvers.iteration import Settings, default_tolerance, solve_iteratively
from pcr_fx.solvers.linearisation import ITERATIVE_SOLVERS, linearisation
from pcr_fx.solvers.sequential import blocks, solve_sequential
from pcr_fx.stopping import Outcome, SolveStats

__all__ = [
    "ITERATIVE_SOLVERS",
    "Outcome",
    "Settings",
    "SolveStats",
    "adjoint_sequential",
    "adjoint_transposed",
    "blocks",
    "default_tolerance",
    "linearisation",
    "solve_iteratively",
    "solve_sequential",
]
