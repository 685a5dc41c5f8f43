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


class Batch:
    """The chain of many blocks at once, of one call.

    Args:
        plan, record, num_operands: of the chain.
        size: how many.
        dims: which dimension of each tensor counts them; `None` where they have it in common.
        tensors: the flat initial state, the operands and the shared operands.

    Attributes:
        found: the chain; nothing where blocks have to run one by one.
    """

    def __init__(
        self,
        plan: Plan,
        record: int,
        num_operands: int,
        size: int,
        dims: Sequence[int | None],
        tensors: Sequence[Tensor],
    ) -> None:
        self.plan, self.record, self.num_operands, self.size = plan, record, num_operands, size
        self.dims, self.tensors, self.layout = tuple(dims), tensors, plan.program.layout
        own, common = split(num_operands)
        pairs = list(zip(tensors[1:], dims[1:], strict=True))
        operands = [one if dim is None else one.movedim(dim, 1) for one, dim in pairs[own]]
        shared = [one if dim is None else one.movedim(dim, 0) for one, dim in pairs[common]]
        states = self.layout.unflatten(self._counted(tensors[0], dims[0], 0), leading=1)
        self.inputs = Inputs(states, operands, shared)
        many = tuple(dim is not None for dim in dims[1:])
        which = many[own], many[common]
        of = functools.partial(of_batches, plan.program.chain, *which)
        self.found = find(plan, ("batches", *which), of, self.inputs) if size else None

    def _counted(self, tensor: Tensor, dim: int | None, to: int) -> Tensor:
        """A tensor with the dimension that counts at `to`, whether it had one or not."""
        if dim is not None:
            return tensor.movedim(dim, to)
        return tensor.unsqueeze(to).expand(*tensor.shape[:to], self.size, *tensor.shape[to:])

    def of_trajectory(self, solve: Callable[..., Any]) -> tuple[Tensor, int]:
        """Many trajectories, and which dimension counts them.

        Args:
            solve: `derivatives.Solve.apply`.
        """
        if self.found is None:
            trajectory = function_of(self.plan.program, self.num_operands, self.tensors, [True] * len(self.tensors))
            return torch.vmap(trajectory, in_dims=self.dims)(*self.tensors), 0
        layout, (states, operands, shared) = self.found.program.layout, self.inputs
        how = *named(self.found, self.record, states[0].device), self.num_operands
        whole = solve(layout.flatten(states), *how, *operands, *shared)
        return self.layout.flatten(layout.unflatten(whole, leading=1), leading=2), 1

    def of_gradients(
        self,
        along: Sequence[Tensor],
        dims: Sequence[int | None],
        wanted: tuple[bool, ...],
        adjoint: Callable[..., Any],
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The gradients of many trajectories, and which dimension of each counts them.

        Args:
            along, dims: the trajectory and its cotangents, and which dimension counts these.
            wanted: whose gradients are, of operands and shared operands, which there are many of; empty for all.
            adjoint: `derivatives.Adjoint.apply`.
        """
        program = self.plan.program.wanting(wanted or None)
        if self.found is None:
            run = functools.partial(_gradients_one_by_one, program, self.num_operands)
            first, *rest = self.tensors
            found = torch.vmap(run, in_dims=(self.dims[0], dims[1], *self.dims[1:]))(first, along[1], *rest)
            return found, (0,) * len(found)
        layout, (states, operands, shared) = self.found.program.layout, self.inputs
        counted = [self._counted(one, dim, 1) for one, dim in zip(along, dims, strict=True)]
        flat = [layout.flatten(self.layout.unflatten(one, leading=2), leading=1) for one in counted]
        how = *named(self.found, self.record, states[0].device), self.num_operands, wanted
        first, *others = adjoint(layout.flatten(states), *flat, *how, *operands, *shared)
        count = sum(program.differentiable_operands)
        back = self.layout.flatten(layout.unflatten(first), leading=1)
        return (back, *others), (0, *(1,) * count, *(0,) * (len(others) - count))


def each_with_its_own(
    plan: Plan, wanted: tuple[bool, ...], size: int, dims: Sequence[int | None], tensors: Sequence[Tensor]
) -> tuple[list[int | None], list[Tensor]]:
    """What `Batch` is given so that each of many has gradients of its own with respect to what they have in common."""
    needs = [False, *plan.program.wanting(wanted or None).differentiable]
    pairs = [
        (0, one.expand(size, *one.shape)) if need and dim is None else (dim, one)
        for need, dim, one in zip(needs, dims, tensors, strict=True)
    ]
    return [dim for dim, _ in pairs], [one for _, one in pairs]


def _gradients_one_by_one(
    program: Program, num_operands: int, initial: Tensor, cotangents: Tensor, *tensors: Tensor
) -> tuple[Tensor, ...]:
    gradients = gradients_of_function(program, num_operands, initial, tensors)
    return gradients(cotangents, *active_of(initial, tensors))
