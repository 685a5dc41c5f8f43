"""One transposed reduction in PyTorch's ops, backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pcr_fx.body import Program
from pcr_fx.call import Call
from pcr_fx.solvers import Settings, adjoint_transposed
from pcr_fx.ways import costs
from pcr_fx.ways.case import Case
from pcr_fx.ways.iterative import affordable_window, why_it_waits
from pcr_fx.ways.memory import block_bytes
from pcr_fx.ways.way import Backward, Refused


@dataclass(frozen=True)
class Reduction(Backward):
    """The whole adjoint as one linear system, or one a window of blocks."""

    solver: str = "newton"
    window: int | None = None

    @classmethod
    def of(cls, case: Case) -> Reduction | Refused:
        window = affordable_window(case, "newton")
        return window if isinstance(window, Refused) else cls("newton", window)

    def fault(self, program: Program) -> str:
        return program.of_length(self.window or program.length).fault("linearise", "pullback")

    def hopeless(self, case: Case, direction: str) -> str:
        return why_it_waits(case)

    def bounds(self, case: Case, direction: str) -> costs.Bounds:
        return costs.reduction(case, False)

    def memory(self, program: Program, samples: int, settings: Settings) -> int:
        return (self.window or program.length) * block_bytes(self.solver, program, samples)

    def solve_adjoint(
        self, program: Program, call: Call, trajectory: Tensor, cotangents: Tensor, settings: Settings
    ) -> tuple[Sequence[Tensor], bool]:
        return adjoint_transposed(program, call, trajectory, cotangents, settings.linear_solver, self.window)
