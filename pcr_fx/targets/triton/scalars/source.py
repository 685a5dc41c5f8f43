"""What the Triton source of a chain's kernels has in common where all numbers of a block fit in a thread's registers.

Both directions are a chain of columns. Forward, column k is block k, x_k = f_k(x_{k-1}). Backward, columns are counted
from the end: the adjoints are x_k = g_{L-1-k} + J_{L-k}^T x_{k-1}. There is one more than there are blocks, since the
last is the cotangent of the initial state. In memory adjoints lie in the order of the states, `[L + 1, samples, d]`
with that of the initial state first.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from pcr_fx.targets.triton.printer import print_scalar
from pcr_fx.targets.triton.source import KernelSource


@dataclass(frozen=True)
class ScalarSource(KernelSource):
    """Prints one kind of kernel of one chain with scalars."""

    @abstractmethod
    def text(self, direction: str) -> str:
        """The kernel `"forward"` or `"adjoint"`, without the header.

        Raises:
            Unprintable: the body has an op that cannot be printed, or is too large to be written out.
        """

    @property
    def zeros(self) -> str:
        """A zero in each lane. Added to a value that is the same in all lanes, it makes a tensor of it."""
        return f"tl.zeros([BLOCK], {self.real})"

    def number(self, value: float) -> str:
        return print_scalar(value, self.real)


def largest(terms: Iterable[str]) -> str:
    first, *rest = terms
    for term in rest:
        first = f"tl.maximum({first}, {term}, tl.PropagateNan.ALL)"
    return first
