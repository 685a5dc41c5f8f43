"""The outputs of a chain where no kernel gives them: computed of its trajectories, for all blocks at once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pcr_fx.body import OutputProgram, build_outputs
from pcr_fx.chain import Head, TensorSpec
from pcr_fx.derivatives import Outputs
from pcr_fx.errors import BodyError
from pcr_fx.looks import autocast_dtype

log = logging.getLogger(__name__)

# Shapes and dtypes that a program is kept for.
_PROGRAMS = 256


class OutputsBehind:
    """The outputs of a head.

    Args:
        head: what computes them.
        length: L.
        name: of the chain, for what is logged.
    """

    def __init__(self, head: Head, length: int, name: str) -> None:
        self.head, self.length, self.name = head, length, name
        # By the tensors that they are for; `None` where the blocks' outputs cannot be computed at once.
        self.programs: dict[Any, OutputProgram | None] = {}

    def of(
        self,
        states: Sequence[Tensor],
        trajectories: list[Tensor],
        operands: list[Tensor],
        shared: Sequence[Tensor],
    ) -> Sequence[Tensor]:
        """The outputs of all blocks, each `[L, ...]`.

        Args:
            states: initial ones.
            trajectories, operands: `[L, ...]`; those of the head, as `shared`.
        """
        head, old = self.head, trajectories
        if head.reads_old_states(len(states)):
            pairs = zip(states, trajectories, strict=True)
            old = [torch.cat([state.unsqueeze(0).to(whole.dtype), whole[:-1]]) for state, whole in pairs]
        number, device = trajectories[0].dtype, trajectories[0].device
        literals = [torch.tensor(values, dtype=number, device=device) for values in head.literals]
        given = [*old, *trajectories, *operands, *literals]
        program = self._program(given, shared)
        if program is not None:
            return Outputs.apply(program, *given, *shared)
        numbers = zip(*head.literals, strict=True) if head.literals else [()] * self.length
        each = zip(*(tensor.unbind(0) for tensor in given[: len(given) - len(literals)]), strict=True)
        found = [head.body.forward(*block, *number, *shared) for block, number in zip(each, numbers, strict=True)]
        return [torch.stack(values) for values in zip(*found, strict=True)]

    def _program(self, given: Sequence[Tensor], shared: Sequence[Tensor]) -> OutputProgram | None:
        if autocast_dtype(given[0].device.type) is not None:
            return None  # each op has a dtype of its own
        groups = tuple(
            tuple(TensorSpec(tuple(int(size) for size in one.shape), one.dtype, one.device) for one in group)
            for group in (given, shared)
        )
        if groups not in self.programs:
            try:
                self.programs[groups] = build_outputs(self.head, *groups)
            except BodyError as reason:
                log.warning("the outputs of %s are computed block by block: %s", self.name, reason)
                self.programs[groups] = None
            if len(self.programs) > _PROGRAMS:
                self.programs.pop(next(iter(list(self.programs))), None)  # other threads may be at it, too
        return self.programs[groups]
