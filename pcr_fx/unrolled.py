"""A chain's trajectory and gradients block by block, in the model's own ops, as functions that any transform takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pcr_fx.body import Program
from pcr_fx.ways import evaluate

# So many roundings of the sum of all numbers are no contradiction.
_ROUNDINGS = 1e4


def function_of(
    program: Program, num_operands: int, primals: Sequence[Tensor], moves: Sequence[bool]
) -> Callable[..., Tensor]:
    """The trajectory as a function of some of a chain's inputs, in the model's own ops.

    Args:
        primals: the flat initial state, the operands and the shared operands.
        moves: which of them it is a function of.
    """

    def trajectory(*moving: Tensor) -> Tensor:
        waiting = iter(moving)
        every = [next(waiting) if is_moving else fixed for is_moving, fixed in zip(moves, primals, strict=True)]
        return unrolled(program, every[0], every[1 : 1 + num_operands], every[1 + num_operands :])

    return trajectory


def unrolled(program: Program, initial: Tensor, operands: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
    """The trajectory `[L, *batch, d]` block by block, in the model's own ops, which any transform can differentiate."""
    layout = program.layout
    trajectory = evaluate(program.chain, layout.unflatten(initial), operands, shared)
    return torch.stack([layout.flatten(states) for states in trajectory.values()])


def gradients_of_function(
    program: Program, num_operands: int, initial: Tensor, tensors: Sequence[Tensor]
) -> Callable[..., tuple[Tensor, ...]]:
    """The gradients as a function `(cotangents, *active)` of all inputs that have any, in the model's own ops.

    Returns:
        Those of the initial state and of what is wanted.
    """
    has = [True, *(one.is_floating_point() or one.is_complex() for one in tensors)]
    needs = [True, *program.differentiable]
    trajectory = function_of(program, num_operands, [initial, *tensors], has)

    def gradients(cotangents: Tensor, *active: Tensor) -> tuple[Tensor, ...]:
        found = iter(torch.func.vjp(trajectory, *active)[1](cotangents))
        every = [next(found) if one else None for one in has]
        return tuple(one for one, need in zip(every, needs, strict=True) if need)  # type: ignore[misc]

    return gradients


def active_of(initial: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The inputs of a chain that have gradients."""
    return [initial, *(one for one in tensors if one.is_floating_point() or one.is_complex())]


def pushforward(
    function: Callable[..., tuple[Tensor, ...]], primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`torch.func.jvp` without forward mode, which PyTorch does not nest, and which stops at some views.

    What pulls cotangents back is linear in them, and is pulled back itself by the tangents.
    """
    results, pull = torch.func.vjp(function, *primals)  # type: ignore[misc]
    _, push = torch.func.vjp(lambda *cotangents: pull(cotangents), *map(torch.zeros_like, results))  # type: ignore[misc]
    return results, push(tuple(tangents))


def second_order_fault(
    block: Callable[..., tuple[Tensor, ...]], primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> str:
    """How PyTorch's derivatives of a block contradict each other, or nothing.

    The gradient of its tangents has to be the tangent of its gradient. Of some ops (layer norm) one of them is wrong, since
    what the op keeps for its backward is taken for constant where that is differentiated twice.
    """
    with torch.no_grad():
        cotangents = tuple(torch.cos(3 * one) for one in block(*primals))
    pulled = torch.func.vjp(lambda *given: pushforward(block, given, tangents)[1], *primals)[1](cotangents)
    _, pushed = pushforward(lambda *given: torch.func.vjp(block, *given)[1](cotangents), primals, tangents)
    for ours, theirs in zip(pulled, pushed, strict=True):
        both = ours.isfinite() & theirs.isfinite()
        size, error = (float(torch.where(both, one, 0).abs().sum()) for one in (theirs, ours - theirs))
        if error > _ROUNDINGS * torch.finfo(theirs.dtype).eps * max(size, 1.0):
            return f"PyTorch's third derivatives of the block are off by {error:.2g}, where they are {size:.2g} in all"
    return ""
