"""The blocks as the model wrote them, under plain autograd: no way of a solve node, and what all are measured against."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pcr_fx.body.isolation import wants_every_op
from pcr_fx.chain import Chain
from pcr_fx.solvers import blocks

# As reports name it.
EAGER = "eager"


def evaluate_whole(
    chain: Chain,
    states: Sequence[Tensor],
    given: Sequence[tuple[Sequence[Tensor | Sequence[Tensor]], Sequence[Tensor]]],
    wanted: Collection[int] | None = None,
) -> dict[int, tuple[Tensor, ...]]:
    """As `evaluate`, with the outputs behind the states.

    Args:
        given: per-block and shared operands of the chain, then of its head.
    """
    head = chain.head
    if head is None:
        return evaluate(chain, states, *given[0], wanted)
    (operands, shared), (head_operands, head_shared) = given
    inputs = [
        list(
            zip(
                blocks(every, chain.length),
                zip(*literals, strict=True) if literals else [()] * chain.length,
                strict=True,
            )
        )
        for every, literals in ((operands, chain.literals), (head_operands, head.literals))
    ]
    found = {}
    for index, ((block, numbers), (further, more)) in enumerate(zip(*inputs, strict=True)):
        values = tuple(_run(chain, head.block, *states, *block, *numbers, *shared, *further, *more, *head_shared))
        states = values[: chain.num_states]
        if wanted is None or index in wanted:
            found[index] = values
    return found


def evaluate(
    chain: Chain,
    states: Sequence[Tensor],
    operands: Sequence[Tensor | Sequence[Tensor]],
    shared: Sequence[Tensor],
    wanted: Collection[int] | None = None,
) -> dict[int, tuple[Tensor, ...]]:
    """The states after each block, or after the blocks that are wanted, by block; behind them outputs that the body returns.

    A value that nobody wants is let go at once, as the model does: its memory is still in the cache for the next.

    Args:
        states: the initial states.
        operands: per-block operands, stacked `[L, ...]` or a tensor a block; without the literals.
        wanted: numbers of blocks; `None` for all.
    """
    literals = list(zip(*chain.literals, strict=True)) or [()] * chain.length
    found = {}
    for index, (block, numbers) in enumerate(zip(blocks(operands, chain.length), literals, strict=True)):
        values = tuple(_run(chain, chain.body.forward, *states, *block, *numbers, *shared))
        states = values[: chain.num_states]
        if wanted is None or index in wanted:
            found[index] = values
    return found


def _run(chain: Chain, block: Callable[..., Any], *tensors: Any) -> Any:
    """One block; what lies between its states is let go if the model's author wanted that."""
    is_kept = not chain.is_checkpoint or not torch.is_grad_enabled() or wants_every_op()
    return block(*tensors) if is_kept else checkpoint(block, *tensors, use_reentrant=False, preserve_rng_state=False)
