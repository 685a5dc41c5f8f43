"""The case that ways are offered for: a chain, so many samples, what may be used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from pcr_fx.body import Program
from pcr_fx.options import Options
from pcr_fx.targets import Kernel
from pcr_fx.ways.memory import in_units, memory_limit

# Memory that is taken without asking how much is free, which takes a while.
BYTES_UNASKED = 2**26


@dataclass(frozen=True)
class Case:
    """A chain's program for so many independent samples.

    Attributes:
        kernel: the chain's kernel, or why it has none.
    """

    program: Program
    samples: int
    kernel: Kernel | str
    options: Options

    @property
    def usable_kernel(self) -> Kernel | None:
        """The kernel, if there is one, it could be compiled, and memory has room for it."""
        return None if isinstance(self.kernel, str) or self.why_no_kernel else self.kernel

    @property
    def why_no_kernel(self) -> str:
        """Why there is no kernel to use, or nothing."""
        if isinstance(self.kernel, str):
            return self.kernel
        if self.kernel.failure is not None:
            return self.kernel.failure
        needed = self.kernel.scratch_bytes(self.samples)
        if self.has_room(needed):
            return ""
        return f"{self.kernel.kind} kernels need {in_units(needed)}, and the memory limit is {in_units(self.limit)}"

    def has_room(self, needed: int) -> bool:
        """Whether so many bytes may be taken."""
        return needed <= BYTES_UNASKED or needed <= self.limit

    @cached_property
    def limit(self) -> int:
        """Bytes that linear systems may take."""
        return memory_limit(self.options.memory_limit, self.program.signature.states[0].device)

    @property
    def is_plain_newton(self) -> bool:
        """Whether nothing is asked of Newton's method that kernels do not do."""
        options = self.options
        return (options.damping, options.window, options.start, options.linear_solver) == (1.0, None, "repeat", "auto")

    @property
    def operations(self) -> int:
        """Arithmetic operations of a block, over all samples."""
        return max(self.samples, 1) * self.sample_operations

    @property
    def sample_operations(self) -> int:
        """Arithmetic operations of a block on one sample: counted where its kernel is, else guessed from its sizes."""
        counted = None if isinstance(self.kernel, str) else self.kernel.operations
        if counted is not None:
            return max(counted[0], 1)
        program = self.program
        weights = sum(math.prod(spec.shape) for spec in (*program.signature.operands, *program.signature.shared))
        # A weight is used once a sample, at the least; an operand of each sample has its share of them.
        return 2 * weights // max(self.samples, 1) + len(program.ops) * program.dimension + 1
