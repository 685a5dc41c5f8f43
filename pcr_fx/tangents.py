"""Tangents of a chain's trajectory, and of its gradients: solves and adjoints of the chain of states and tangents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pcr_fx.planner import Plan
from pcr_fx.transformed import Inputs, chosen, find, named, of_tangents, present, split
from pcr_fx.unrolled import function_of, pushforward


class Tangents:
    """The chain of states and their tangents, of one call.

    Args:
        plan, record, num_operands: of the chain.
        primals: the flat initial state, the operands and the shared operands.
        moving: their tangents, as far as there are any.

    Attributes:
        found: the chain; nothing where blocks have to run one by one.
    """

    def __init__(
        self,
        plan: Plan,
        record: int,
        num_operands: int,
        primals: Sequence[Tensor],
        moving: Sequence[Tensor | None],
    ) -> None:
        self.plan, self.record, self.num_operands = plan, record, num_operands
        self.primals, self.layout = primals, plan.program.layout
        self.moves = [True, *(one is not None for one in moving[1:])]
        self.moving = [torch.zeros_like(primals[0]) if moving[0] is None else moving[0], *present(moving[1:])]
        own, common = split(num_operands)
        operands, shared = ([*primals[1:][part], *present(moving[1:][part])] for part in (own, common))
        self.inputs = Inputs(self._both(primals[0], self.moving[0]), operands, shared)
        self.which = tuple(self.moves[1:][own]), tuple(self.moves[1:][common])
        of = functools.partial(of_tangents, plan.program.chain, *self.which)
        self.found = find(plan, ("tangents", *self.which), of, self.inputs)

    def _both(self, of_states: Tensor, of_tangents: Tensor, leading: int = 0) -> list[Tensor]:
        return [part for one in (of_states, of_tangents) for part in self.layout.unflatten(one, leading)]

    def solved(self, solve: Callable[..., Any]) -> Tensor:
        """The trajectory of states and tangents, as this chain has it."""
        assert self.found is not None, "who asks has looked"
        initial = self.found.program.layout.flatten(self.inputs.states)
        _, operands, shared = self.inputs
        return solve(initial, *named(self.found, self.record, initial.device), len(operands), *operands, *shared)  # type: ignore[no-any-return]

    def of_trajectory(self, solve: Callable[..., Any]) -> Tensor:
        """The tangents of the trajectory, `[L, *batch, d]`.

        Args:
            solve: `derivatives.Solve.apply`.
        """
        if self.found is None:
            trajectory = function_of(self.plan.program, self.num_operands, self.primals, self.moves)
            primals = chosen(self.primals, self.moves)
            return pushforward(lambda *moving: (trajectory(*moving),), primals, self.moving)[1][0]
        return self._second(self.solved(solve))

    def _second(self, both: Tensor) -> Tensor:
        assert self.found is not None, "who asks has looked"
        parts = self.found.program.layout.unflatten(both, leading=1)
        return self.layout.flatten(parts[len(parts) // 2 :], leading=1)

    def of_gradients(
        self,
        cotangents: Tensor,
        moving: Tensor | None,
        wanted: Sequence[bool],
        solve: Callable[..., Any],
        adjoint: Callable[..., Any],
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The tangents of the trajectory, and those of gradients: of the initial state, and of those wanted.

        A tangent of `J(x)^T c` is the gradient, with respect to `x`, of `c` times the tangents of the trajectory and of the
        tangents of `c` times the trajectory: an adjoint of this chain.

        Args:
            cotangents, moving: those of the trajectory, and their tangents.
            wanted: which operands and shared operands.
            solve, adjoint: `derivatives.Solve.apply` and `derivatives.Adjoint.apply`.
        """
        assert self.found is not None, "who asks has looked"
        both, layout = self.solved(solve), self.found.program.layout
        given = self._both(torch.zeros_like(cotangents) if moving is None else moving, cotangents, leading=1)
        initial, (_, operands, shared) = layout.flatten(self.inputs.states), self.inputs
        asked = [
            one
            for part, which in zip(split(self.num_operands), self.which, strict=True)
            for one in (*wanted[part], *(False for _ in range(sum(which))))
        ]
        how = *named(self.found, self.record, initial.device), len(operands), tuple(asked)
        first, *rest = adjoint(initial, both, layout.flatten(given, leading=1), *how, *operands, *shared)
        of_states = layout.unflatten(first)
        return self._second(both), [self.layout.flatten(of_states[: len(of_states) // 2]), *rest]
