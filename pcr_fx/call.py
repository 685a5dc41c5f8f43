"""What a chain is called with, as one record: ways, solvers and kernels all take it as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """The tensors of one call of a chain.

    Attributes:
        initial: the initial state of every sample, flat, `[*batch, d]`.
        operands: the per-block operands, then the literals: each stacked, `[L, ...]`, or for kernels that read them in
            place a table of where the parts lie.
        shared: shared operands, which every block gets whole.
    """

    initial: Tensor
    operands: Sequence[Any]
    shared: Sequence[Tensor]

    def first(self, count: int) -> Call:
        """The call of the first `count` blocks; its operands are stacked."""
        return Call(self.initial, [operand[:count] for operand in self.operands], self.shared)

    def window(self, begin: int, end: int) -> list[Tensor]:
        """The stacked operands of the blocks from `begin` up to `end`."""
        return [operand[begin:end] for operand in self.operands]
