"""Block by block in PyTorch's ops: always there, and what everything else is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pcr_fx.body import Program
from pcr_fx.call import Call
from pcr_fx.solvers import Settings, adjoint_sequential, solve_sequential
from pcr_fx.ways import costs
from pcr_fx.ways.case import Case
from pcr_fx.ways.way import Backward, Forward, Solution


@dataclass(frozen=True)
class Sequential(Forward, Backward):
    """Both ways."""

    solver: str = "sequential"
    adds_nothing: ClassVar[bool] = True
    scales: ClassVar[bool] = True

    def bounds(self, case: Case, direction: str) -> costs.Bounds:
        return costs.in_ops(case, direction)

    def solve(
        self, program: Program, call: Call, settings: Settings, start: Tensor | None = None, fall_back: bool = True
    ) -> Solution:
        return Solution(solve_sequential(program, call))

    def solve_adjoint(
        self, program: Program, call: Call, trajectory: Tensor, cotangents: Tensor, settings: Settings
    ) -> tuple[Sequence[Tensor], bool]:
        return adjoint_sequential(program, call, trajectory, cotangents), True
