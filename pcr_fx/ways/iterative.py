"""An iterative solver in PyTorch's ops, forward."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from pcr_fx.body import Program
from pcr_fx.call import Call
from pcr_fx.solvers import Settings, linearisation, solve_iteratively
from pcr_fx.ways import costs
from pcr_fx.ways.case import Case
from pcr_fx.ways.memory import MIN_WINDOW, block_bytes, fitting_window, in_units
from pcr_fx.ways.way import Forward, Refused, Solution


@dataclass(frozen=True)
class Iterative(Forward):
    """Newton's method or a cheaper relative, on all blocks or a window of them at a time."""

    solver: str
    window: int | None = None

    @classmethod
    def of(cls, case: Case, solver: str) -> Iterative | Refused:
        window = affordable_window(case, solver)
        return window if isinstance(window, Refused) else cls(solver, window)

    def fault(self, program: Program) -> str:
        return program.of_length(self.window or program.length).fault(*linearisation(self.solver).programs)

    def hopeless(self, case: Case, direction: str) -> str:
        return why_it_waits(case)

    def bounds(self, case: Case, direction: str) -> costs.Bounds:
        return costs.iteration(case, self.solver, False, self.window)

    def memory(self, program: Program, samples: int, settings: Settings) -> int:
        return (self.window or program.length) * block_bytes(self.solver, program, samples)

    def depth(self, program: Program, samples: int, iterations: int, settings: Settings) -> int:
        kind = linearisation(self.solver, settings.probes)
        return iterations * kind.depth(self.window or program.length, settings.linear_solver)

    def solve(
        self, program: Program, call: Call, settings: Settings, start: Tensor | None = None, fall_back: bool = True
    ) -> Solution:
        return Solution(*solve_iteratively(program, call, self.solver, replace(settings, window=self.window), start))


def affordable_window(case: Case, solver: str) -> int | Refused | None:
    """Blocks whose linear systems fit into memory at a time; `None` for all of them."""
    length = case.program.length
    window = fitting_window(solver, case.program, case.samples, case.limit, case.options.window)
    if window is None:
        fit = f"a window of {MIN_WINDOW} blocks would not fit into the memory limit, {in_units(case.limit)}"
        return Refused(solver, fit)
    return None if window == length else window


def why_it_waits(case: Case) -> str:
    """Why PyTorch's ops need not be timed where kernels that queue can be had, or nothing."""
    kernel = case.usable_kernel
    if kernel is None or not kernel.queues:
        return ""
    return f"it waits for the GPU at every iteration, which {kernel.kind} kernels do not"
