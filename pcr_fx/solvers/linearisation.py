"""What stands in for a block's Jacobian in the linear system of an iteration.

All solve delta_l = A_l delta_{l-1} + r_l with delta_0 = 0 for the correction of a trajectory, r_l = f_l(z_{l-1}) - z_l
being what each block makes of the state before beyond the state there is. With A = J this is Newton's method (DeepPCR,
arXiv 2309.16318, equations 4 to 6); with its diagonal quasi-DEER (Gonzalez et al., arXiv 2407.19115); with the identity
Picard's iteration, as in ParaDiGMS (Shih et al., arXiv 2305.16317); with zero Jacobi's. All have the same fixed point,
and state l is right after l iterations at the latest, whatever A is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pcr_fx.body import Program
from pcr_fx.linear import sequential_depth, solve_recurrence


class Linearisation(ABC):
    """One choice of A.

    Attributes:
        solver: the name of the iteration that it makes.
        fewest: iterations that no chain worth iterating does without.
        most: iterations before giving up, where nobody says otherwise. Cheaper ones are more.
        programs: those of all blocks that it runs.
    """

    solver: ClassVar[str]
    programs: ClassVar[tuple[str, ...]] = ("evaluate",)
    fewest: ClassVar[int]
    most: ClassVar[int]

    @abstractmethod
    def entries(self, dimension: int) -> int:
        """Numbers of A that one block and sample holds."""

    @abstractmethod
    def pullbacks(self, dimension: int) -> int:
        """Times that a block is differentiated for its A."""

    @abstractmethod
    def depth(self, length: int, linear_solver: str) -> int:
        """Steps one after another in which a system of `length` blocks is solved."""

    @abstractmethod
    def linearise(
        self, program: Program, previous: Tensor, operands: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """What the blocks compute of `previous` `[L, *batch, d]`, and A in a form of this linearisation's own."""

    @abstractmethod
    def correct(self, matrices: Tensor | None, residuals: Tensor, linear_solver: str) -> Tensor:
        """delta `[L, *batch, d]` from r of the same shape."""


class Full(Linearisation):
    """A = J."""

    solver, fewest, most = "newton", 2, 32

    def entries(self, dimension: int) -> int:
        return dimension**2

    def pullbacks(self, dimension: int) -> int:
        return dimension

    def depth(self, length: int, linear_solver: str) -> int:
        return sequential_depth(length, linear_solver)

    def linearise(
        self, program: Program, previous: Tensor, operands: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        return program.linearise(previous, *operands, *shared)

    def correct(self, matrices: Tensor | None, residuals: Tensor, linear_solver: str) -> Tensor:
        assert matrices is not None
        return solve_recurrence(matrices, residuals, linear_solver)


class Diagonal(Linearisation):
    """A = diag(J): exact, from d pullbacks that need the memory of one; or estimated from random probes.

    Args:
        probes: random signs v that estimate the diagonal, the mean of v * (J^T v) (Hutchinson's estimator, after
            Bekas, Kokiopoulou and Saad, 2007, section 2); `None` for the exact one. They are the same in every call.
    """

    solver, fewest, most = "quasi-newton", 3, 64

    def __init__(self, probes: int | None = None) -> None:
        self.probes = probes

    def entries(self, dimension: int) -> int:
        return dimension

    def pullbacks(self, dimension: int) -> int:
        return self.probes or dimension

    def depth(self, length: int, linear_solver: str) -> int:
        return sequential_depth(length, linear_solver)

    def linearise(
        self, program: Program, previous: Tensor, operands: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        def pulled(cotangent: Tensor) -> Tensor:
            return program.pull(previous, *operands, *shared, cotangent.expand_as(previous).contiguous())

        values = program.evaluate(previous, *operands, *shared)
        if self.probes is None:
            rows = torch.eye(previous.shape[-1], dtype=previous.dtype, device=previous.device)
            return values, torch.stack([pulled(row)[..., index] for index, row in enumerate(rows)], -1)
        generator = torch.Generator().manual_seed(0)
        total = torch.zeros_like(previous)
        for _ in range(self.probes):
            signs = 1.0 - 2.0 * torch.randint(0, 2, previous.shape[-1:], generator=generator)
            signs = signs.to(previous)
            total += signs * pulled(signs)
        return values, total / self.probes

    def correct(self, matrices: Tensor | None, residuals: Tensor, linear_solver: str) -> Tensor:
        assert matrices is not None
        # Features do not meet: each is a recurrence of its own, over matrices of one entry.
        return solve_recurrence(matrices[..., None, None], residuals.unsqueeze(-1), linear_solver).squeeze(-1)


class Identity(Linearisation):
    """A = I."""

    solver, fewest, most = "picard", 3, 256

    def entries(self, dimension: int) -> int:
        return 0

    def pullbacks(self, dimension: int) -> int:
        return 0

    def depth(self, length: int, linear_solver: str) -> int:
        return sequential_depth(length, "parallel_cyclic_reduction")  # as a parallel sum

    def linearise(
        self, program: Program, previous: Tensor, operands: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        return program.evaluate(previous, *operands, *shared), None

    def correct(self, matrices: Tensor | None, residuals: Tensor, linear_solver: str) -> Tensor:
        return residuals.cumsum(0)


class Zero(Identity):
    """A = 0."""

    solver, fewest, most = "jacobi", 3, 256

    def depth(self, length: int, linear_solver: str) -> int:
        return 1

    def correct(self, matrices: Tensor | None, residuals: Tensor, linear_solver: str) -> Tensor:
        return residuals


# The iterative solvers, the most costly iteration and the fewest of them first.
ITERATIVE_SOLVERS = tuple(kind.solver for kind in (Full, Diagonal, Identity, Zero))


def linearisation(solver: str, probes: int | None = None) -> Linearisation:
    """The linearisation of an iterative solver, by the solver's name."""
    kinds: list[Linearisation] = [Full(), Diagonal(probes), Identity(), Zero()]
    return next(kind for kind in kinds if kind.solver == solver)
