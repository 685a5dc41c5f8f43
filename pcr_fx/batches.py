"""Trajectories and gradients of many chains at once, under `vmap`: solves and adjoints of the chain of many blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pcr_fx.body import Program
from pcr_fx.planner import Plan
from pcr_fx.transformed import Inputs, find, named, of_batches, split
from pcr_fx.unrolled import active_of, function_of, gradients_of_function


def batch_of_trajectories(
    plan: Plan,
    record: int,
    num_operands: int,
    size: int,
    dims: Sequence[int | None],
    tensors: Sequence[Tensor],
    solve: Callable[..., Any],
) -> tuple[Tensor, int]:
    """Many trajectories, and which dimension counts them.

    Args:
        size: how many.
        dims: which dimension of each tensor counts them; `None` where they have it in common.
        tensors: the flat initial state, the operands and the shared operands.
        solve: `derivatives.Solve.apply`.
    """
    layout = plan.program.layout
    inputs, found = _batch(plan, num_operands, size, dims, tensors)
    if found is None:
        trajectory = function_of(plan.program, num_operands, tensors, [True] * len(tensors))
        return torch.vmap(trajectory, in_dims=tuple(dims))(*tensors), 0
    flat = found.program.layout.flatten(inputs.states)
    whole = solve(flat, *named(found, record, flat.device), num_operands, *inputs.operands, *inputs.shared)
    return layout.flatten(found.program.layout.unflatten(whole, leading=1), leading=2), 1


def batch_of_gradients(
    plan: Plan,
    record: int,
    num_operands: int,
    size: int,
    dims: Sequence[int | None],
    tensors: Sequence[Tensor],
    wanted: tuple[bool, ...],
    adjoint: Callable[..., Any],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The gradients of many trajectories, and which dimension of each counts them.

    Args:
        size, dims: as for `batch_of_trajectories`.
        tensors: the flat initial state, the trajectory, its cotangents, the operands and the shared operands.
        wanted: whose gradients are, of operands and shared operands; empty for all.
        adjoint: `derivatives.Adjoint.apply`.
    """
    program = plan.program.wanting(wanted or None)
    # Each of many has a gradient of its own with respect to what they have in common.
    every, own_dims = list(tensors), list(dims)
    for at, needs in enumerate(program.differentiable, 3):
        if needs and own_dims[at] is None:
            every[at], own_dims[at] = every[at].expand(size, *every[at].shape), 0
    inputs, found = _batch(plan, num_operands, size, [own_dims[0], *own_dims[3:]], [every[0], *every[3:]])
    if found is None:
        run = functools.partial(_gradients_one_by_one, program, num_operands)
        return torch.vmap(run, in_dims=(dims[0], *dims[2:]))(tensors[0], *tensors[2:]), (0,) * (
            1 + sum(program.differentiable)
        )
    layout = program.layout
    flat = [
        found.program.layout.flatten(layout.unflatten(_counted(one, dim, size, 1), leading=2), leading=1)
        for one, dim in zip(every[1:3], own_dims[1:3], strict=True)
    ]
    first, *rest = adjoint(
        found.program.layout.flatten(inputs.states),
        *flat,
        *named(found, record, flat[0].device),
        num_operands,
        wanted,
        *inputs.operands,
        *inputs.shared,
    )
    count = sum(program.differentiable_operands)
    back = layout.flatten(found.program.layout.unflatten(first), leading=1)
    return (back, *rest), (0, *(1,) * count, *(0,) * (len(rest) - count))


def _batch(
    plan: Plan, num_operands: int, size: int, dims: Sequence[int | None], tensors: Sequence[Tensor]
) -> tuple[Inputs, Plan | None]:
    """What many blocks are called with, and the chain of them; none where there are not any."""
    first = _counted(tensors[0], dims[0], size, 0)
    own, common = split(num_operands)
    pairs = list(zip(tensors[1:], dims[1:], strict=True))
    operands = [one if dim is None else one.movedim(dim, 1) for one, dim in pairs[own]]
    shared = [one if dim is None else one.movedim(dim, 0) for one, dim in pairs[common]]
    inputs = Inputs(plan.program.layout.unflatten(first, leading=1), operands, shared)
    if not size:
        return inputs, None
    many = tuple(dim is not None for dim in dims[1:])
    which = many[own], many[common]
    return inputs, find(plan, ("batches", *which), functools.partial(of_batches, plan.program.chain, *which), inputs)


def _counted(tensor: Tensor, dim: int | None, size: int, to: int) -> Tensor:
    """The tensor with the dimension that counts at `to`, whether it had one or not."""
    return (
        tensor.unsqueeze(to).expand(*tensor.shape[:to], size, *tensor.shape[to:])
        if dim is None
        else tensor.movedim(dim, to)
    )


def _gradients_one_by_one(
    program: Program, num_operands: int, initial: Tensor, cotangents: Tensor, *tensors: Tensor
) -> tuple[Tensor, ...]:
    gradients = gradients_of_function(program, num_operands, initial, tensors)
    return gradients(cotangents, *active_of(initial, tensors))
