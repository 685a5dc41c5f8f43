"""Native code: block by block both ways, and Newton's method forward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from pcr_fx.body import Program
from pcr_fx.call import Call
from pcr_fx.solvers import Outcome, Settings, SolveStats
from pcr_fx.targets import CppKernel
from pcr_fx.ways import costs
from pcr_fx.ways.case import Case
from pcr_fx.ways.iterative import Iterative, affordable_window
from pcr_fx.ways.memory import block_bytes
from pcr_fx.ways.sequential import Sequential
from pcr_fx.ways.way import Backward, Forward, Refused, Solution

# Scalar operations of a block, over all samples, from which on PyTorch's own products gain more than its calls cost where
# a kernel's lanes are features: each sample then goes through all weights. Measured on two cores, forward + backward
# against eager, w = 256..1024, one sample: 1.1 times faster at 0.26 million, 1.4 at 1.05, 0.8 at 4.2. Where lanes are samples,
# kernels were 1.1 to 2.8 times faster at up to 540 million (w = 128..740, 8..512 samples). There threads share the vectors;
# PyTorch's share a product, and so gain where there is a vector for less than every other thread.
KERNEL_OPERATIONS = 1_000_000
THREADS_A_VECTOR = 2
# And from which on it is not worth compiling one to see.
KERNEL_OPERATIONS_MEASURED = 8_000_000


@dataclass(frozen=True)
class Native(Forward, Backward):
    """Block by block, both ways; in PyTorch's ops where the code for some size cannot be compiled.

    Attributes:
        threads: as many as it may use; `None` for as many as the work feeds.
    """

    kernel: CppKernel = field(repr=False)
    solver: str = "sequential"
    threads: int | None = None
    kind: ClassVar[str] = CppKernel.kind
    in_place: ClassVar[bool] = True
    scales: ClassVar[bool] = True

    @classmethod
    def of(cls, case: Case) -> Native | Refused:
        kernel = case.usable_kernel
        if isinstance(kernel, CppKernel):
            return cls(kernel)
        return Refused(f"sequential ({cls.kind} kernel)", case.why_no_kernel)

    @property
    def name(self) -> str:
        return super().name if self.threads is None else f"{self.solver} ({self.kind} kernel, one thread)"

    def alternatives(self, case: Case, direction: str) -> list[Native]:
        """Itself, and where threads would share the work one that does it alone."""
        several = self.kernel.feeds(_KERNELS_WORD[direction], case.samples) > 1
        return [self, replace(self, threads=1)] if several else [self]

    def is_shared(self, case: Case, direction: str) -> bool:
        return self.threads is None and self.kernel.feeds(_KERNELS_WORD[direction], case.samples) > 1

    def is_alone(self, length: int, samples: int) -> bool:
        """Whether one thread does all the work of so many blocks, so that more or fewer of them take as much each."""
        return all(self.kernel.feeds(word, samples, length) == 1 for word in _KERNELS_WORD.values())

    @property
    def failure(self) -> str | None:
        return self.kernel.failure

    def is_ready(self, direction: str, initial: Tensor, wanted: tuple[bool, ...] | None = None) -> bool:
        return self.kernel.is_ready(_KERNELS_WORD[direction], initial, wanted)

    def why_not_paying(self, case: Case) -> str:
        """Why PyTorch's own products are likely to be faster, or nothing."""
        threads, vectors = torch.get_num_threads(), self.kernel.vectors(case.samples)
        if case.operations <= KERNEL_OPERATIONS or THREADS_A_VECTOR * vectors >= threads:
            return ""
        few = f"{vectors} vectors of samples do not feed {threads} threads"
        why = self.kernel.why_features("adjoint", case.samples) or few
        return f"a block has {case.operations} scalar operations, and {why}"

    def hopeless(self, case: Case, direction: str) -> str:
        why = self.kernel.why_features(_KERNELS_WORD[direction], case.samples)
        if case.operations > KERNEL_OPERATIONS_MEASURED and why:
            return f"a block has {case.operations} scalar operations, and {why}"
        return ""

    def bounds(self, case: Case, direction: str) -> costs.Bounds:
        return costs.in_kernel(case, direction)

    def solve(
        self, program: Program, call: Call, settings: Settings, start: Tensor | None = None, fall_back: bool = True
    ) -> Solution:
        if self.is_ready("forward", call.initial):
            return Solution(self.kernel.solve(call, self.threads))
        return Sequential().solve(program, call, settings)

    def solve_adjoint(
        self, program: Program, call: Call, trajectory: Tensor, cotangents: Tensor, settings: Settings
    ) -> tuple[Sequence[Tensor], bool]:
        if self.is_ready("backward", call.initial, program.wanted):
            return self.kernel.solve_adjoint(call, trajectory, cotangents, self.threads, wanted=program.wanted), True
        return Sequential().solve_adjoint(program, call, trajectory, cotangents, settings)


_KERNELS_WORD = {"forward": "forward", "backward": "adjoint"}


@dataclass(frozen=True)
class NativeNewton(Forward):
    """Newton's method, each sample on its own; in PyTorch's ops where there is a start that it cannot take."""

    kernel: CppKernel = field(repr=False)
    solver: str = "newton"
    window: int | None = None
    kind: ClassVar[str] = CppKernel.kind

    @classmethod
    def of(cls, case: Case) -> NativeNewton | Refused:
        window, kernel = affordable_window(case, "newton"), case.usable_kernel
        if isinstance(window, Refused):
            return window
        if not isinstance(kernel, CppKernel):
            return Refused(f"newton ({cls.kind} kernel)", case.why_no_kernel)
        if not case.is_plain_newton:
            return Refused(f"newton ({cls.kind} kernel)", "it does Newton's method without options")
        return cls(kernel, "newton", window)

    @property
    def failure(self) -> str | None:
        return self.kernel.failure

    def hopeless(self, case: Case, direction: str) -> str:
        return "many times the arithmetic of block by block, and a CPU has no idle lanes for it"

    def bounds(self, case: Case, direction: str) -> costs.Bounds:
        return costs.iteration(case, self.solver, True, self.window)

    def memory(self, program: Program, samples: int, settings: Settings) -> int:
        held = min(samples, torch.get_num_threads())  # a sample a thread
        return (self.window or program.length) * block_bytes(self.solver, program, held)

    def depth(self, program: Program, samples: int, iterations: int, settings: Settings) -> int:
        # Threads that samples leave idle share the blocks.
        parts = max(1, torch.get_num_threads() // max(samples, 1))
        return iterations * math.ceil(program.length / parts)

    def solve(
        self, program: Program, call: Call, settings: Settings, start: Tensor | None = None, fall_back: bool = True
    ) -> Solution:
        in_ops = Iterative(self.solver, self.window)
        if not call.initial.numel() or not self.kernel.is_ready("newton", call.initial):
            in_ops_or_sequence = Sequential() if in_ops.fault(program) else in_ops
            return in_ops_or_sequence.solve(program, call, settings, start)
        if start is not None and not in_ops.fault(program):
            return in_ops.solve(program, call, settings, start)
        limit = settings.limit(self.solver, call.length)
        trajectory, outcome, iterations, residual = self.kernel.solve_newton(call, settings.tolerance, limit)
        return Solution(trajectory, SolveStats(Outcome[outcome], iterations, residual))
