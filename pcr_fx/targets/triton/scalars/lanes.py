"""What the Triton source of a chain's kernels has in common where all numbers of a block fit in a thread's registers.

Both directions are a chain. Forward, x_k = f_k(x_{k-1}). Backward, with k counted from the end, the adjoints
x_k = g_{L-1-k} + J_{L-k}^T x_{k-1}, one more than blocks: the last is the cotangent of the initial state. In memory
they lie in the order of the states: `[L + 1, samples, d]`, that of the initial state first.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from pcr_fx.body import Program
from pcr_fx.targets.kernel import Input, LoweredBody
from pcr_fx.targets.triton.inputs import REALS
from pcr_fx.targets.triton.printer import print_scalar


@dataclass(frozen=True)
class Lanes:
    """Prints kernels of one chain.

    Args:
        body: one block of it on one sample.

    Raises, when something is printed:
        Unprintable: the body has an op that cannot be printed, or is too large to be written out.
    """

    body: LoweredBody

    @property
    def program(self) -> Program:
        return self.body.program

    @property
    def inputs(self) -> list[Input]:
        return self.body.inputs

    @cached_property
    def real(self) -> str:
        return REALS[self.program.dtype]

    @property
    def dimension(self) -> int:
        return self.body.dimension

    @property
    def zeros(self) -> str:
        """A zero in each lane: it makes a tensor of what may be a number that all lanes share."""
        return f"tl.zeros([BLOCK], {self.real})"

    def number(self, value: float) -> str:
        return print_scalar(value, self.real)


def largest(terms: Iterable[str]) -> str:
    first, *rest = terms
    for term in rest:
        first = f"tl.maximum({first}, {term}, tl.PropagateNan.ALL)"
    return first


def indent(lines: Sequence[str] | Iterable[str], depth: int) -> str:
    return textwrap.indent("\n".join(lines), "    " * depth)
