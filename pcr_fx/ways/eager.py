"""The blocks as the model wrote them, under plain autograd: no way of a solve node, and what all are measured against."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pcr_fx.body.isolation import allows_hooks, is_transformed, wants_every_op
from pcr_fx.body.reals import to_complex, to_real
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
    if chain.as_written is not None:
        return _as_written(chain, states, given, wanted)
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


def _as_written(
    chain: Chain,
    states: Sequence[Tensor],
    given: Sequence[tuple[Sequence[Tensor | Sequence[Tensor]], Sequence[Tensor]]],
    wanted: Collection[int] | None,
) -> dict[int, tuple[Tensor, ...]]:
    """`evaluate_whole` by the complex blocks that the chain has real and imaginary parts in place of."""
    assert chain.as_written is not None
    written, which = chain.as_written
    written = replace(written, length=chain.length, literals=chain.literals)
    marks = ((which.operands, which.shared), (which.head_operands, which.head_shared))
    every = [
        (_complexes(operands, each), _complexes(shared, common))
        for (operands, shared), (each, common) in zip(given, marks, strict=False)
    ]
    found = evaluate_whole(written, _complexes(states, which.states), every, wanted)
    returned = (*which.states, *which.outputs)
    return {
        block: tuple(to_real(one) if is_complex else one for one, is_complex in zip(values, returned, strict=True))
        for block, values in found.items()
    }


def _complexes(tensors: Sequence[Any], which: Sequence[bool]) -> list[Any]:
    def whole(tensor: Any) -> Any:
        return to_complex(tensor) if isinstance(tensor, Tensor) else [to_complex(one) for one in tensor]

    return [whole(tensor) if is_complex else tensor for tensor, is_complex in zip(tensors, which, strict=True)]


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
    if chain.as_written is not None:
        return _as_written(chain, states, [(operands, shared)], wanted)
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
    is_plain = torch.is_grad_enabled() and allows_hooks() and not is_transformed() and not wants_every_op()
    if not chain.is_checkpoint or not is_plain:
        return block(*tensors)
    return checkpoint(block, *tensors, use_reentrant=False, preserve_rng_state=False)
