"""What prints any of Triton's kernels of a chain begins with."""

from __future__ import annotations

import textwrap
from abc import ABC
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from pcr_fx.body import Interface
from pcr_fx.targets.kernel import Input, LoweredBody
from pcr_fx.targets.triton.printer import REALS


@dataclass(frozen=True)
class KernelSource(ABC):
    """Prints one kind of kernel of one chain.

    Args:
        body: one block of the chain on one sample.
    """

    body: LoweredBody

    @property
    def program(self) -> Interface:
        return self.body.program

    @property
    def inputs(self) -> list[Input]:
        return self.body.inputs

    @property
    def dimension(self) -> int:
        return self.body.dimension

    @cached_property
    def real(self) -> str:
        return REALS[self.program.dtype]


def indent(lines: Iterable[str], depth: int) -> str:
    return textwrap.indent("\n".join(lines), "    " * depth)
