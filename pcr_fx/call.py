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
        length: L, the number of blocks.
    """

    initial: Tensor
    operands: Sequence[Any]
    shared: Sequence[Tensor]
    length: int

    def first(self, count: int) -> Call:
        """The call of the first `count` blocks; its operands are stacked."""
        return self._replace(operands=self.window(0, count), length=count)

    def window(self, begin: int, end: int) -> list[Tensor]:
        """The stacked operands of the blocks from `begin` up to `end`."""
        return [operand[begin:end] for operand in self.operands]
