"""The blocks as the model wrote them, under plain autograd: no way of a solve node, and what all are measured against."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from pcr_fx.chain import Chain
from pcr_fx.solvers import blocks

# As reports name it.
EAGER = "eager"


def evaluate(
    chain: Chain,
    states: Sequence[Tensor],
    operands: Sequence[Tensor | Sequence[Tensor]],
    shared: Sequence[Tensor],
    wanted: Collection[int] | None = None,
) -> dict[int, tuple[Tensor, ...]]:
    """The states after each block, or after the blocks that are wanted, by block.

    A value that nobody wants is let go at once, as the model does: its memory is still in the cache for the next.

    Args:
        states: the initial states.
        operands: per-block operands, stacked `[L, ...]` or a tensor a block; without the literals.
        wanted: numbers of blocks; `None` for all.
    """
    literals = list(zip(*chain.literals, strict=True)) or [()] * chain.length
    found = {}
    for index, (block, numbers) in enumerate(zip(blocks(operands, chain.length), literals, strict=True)):
        states = tuple(chain.body(*states, *block, *numbers, *shared))
        if wanted is None or index in wanted:
            found[index] = states
    return found
