"""Fused kernels on a GPU: block by block or Newton's method, both ways, without waiting for either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from pcr_fx.body import Program
from pcr_fx.call import Call
from pcr_fx.solvers import Settings, linearisation
from pcr_fx.targets import TritonKernel
from pcr_fx.ways import costs
from pcr_fx.ways.case import Case
from pcr_fx.ways.way import Backward, Forward, Refused, Solution


@dataclass(frozen=True)
class Fused(Forward, Backward):
    """By "sequential" or "newton". Where an adjoint's reduction is not accurate, kernels go block by block unasked."""

    kernel: TritonKernel = field(repr=False)
    solver: str = "sequential"
    kind: ClassVar[str] = TritonKernel.kind
    queues: ClassVar[bool] = True

    @classmethod
    def of(cls, case: Case, solver: str) -> Fused | Refused:
        kernel, name = case.usable_kernel, f"{solver} ({cls.kind} kernel)"
        if not isinstance(kernel, TritonKernel):
            return Refused(name, case.why_no_kernel)
        if solver == "sequential":
            return cls(kernel)
        needed = kernel.scratch_bytes(case.samples, case.options.max_iterations or linearisation(solver).most)
        if not case.is_plain_newton or not case.has_room(needed):
            return Refused(name, "Newton's method takes more memory there, or not these options")
        return cls(kernel, solver)

    @property
    def failure(self) -> str | None:
        return self.kernel.failure

    @property
    def is_one_launch(self) -> bool:
        """Whether all iterations of Newton's method are one launch."""
        return self.kernel.is_one_launch

    def bounds(self, case: Case, direction: str) -> costs.Bounds:
        if not self.iterates:
            return costs.in_kernel(case, direction)
        if direction == "backward":
            return costs.reduction(case, True)
        return costs.iteration(case, self.solver, True, None)

    def memory(self, program: Program, samples: int, settings: Settings) -> int:
        if not self.iterates:
            return 0
        return self.kernel.scratch_bytes(samples, settings.limit(self.solver, program.length))

    def depth(self, program: Program, samples: int, iterations: int, settings: Settings) -> int:
        if not self.iterates:
            return program.length
        return iterations * linearisation(self.solver).depth(program.length, settings.linear_solver)

    def solve(
        self, program: Program, call: Call, settings: Settings, start: Tensor | None = None, fall_back: bool = True
    ) -> Solution:
        if not self.iterates:
            return Solution(self.kernel.solve(call))
        limit = settings.limit(self.solver, program.length)
        trajectory, queued = self.kernel.solve_newton(call, settings.tolerance, limit, fall_back)
        return Solution(trajectory, queued=queued)

    def solve_adjoint(
        self, program: Program, call: Call, trajectory: Tensor, cotangents: Tensor, settings: Settings
    ) -> tuple[Sequence[Tensor], bool]:
        every = self.kernel.solve_adjoint(call, trajectory, cotangents, self.solver)[0]
        return [every[index] for index in program.wanted_results], True
