"""Block by block: the reference, and the way out when an iteration does not converge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pcr_fx.body import Program
from pcr_fx.call import Call


def solve_sequential(program: Program, call: Call) -> Tensor:
    """The trajectory `[L, *batch, d]` of the blocks that `call` has the operands of, one after another."""
    layout, body, trajectory = program.layout, program.chain.body.forward, []
    states = layout.unflatten(call.initial)
    for block in blocks(call.operands, call.length):
        # In the model's own ops: PyTorch dispatches them faster than the aten ops they are made of.
        states = body(*states, *block, *call.shared)
        trajectory.append(layout.flatten(states))
    return torch.stack(trajectory)


def blocks(operands: Sequence[Tensor | Sequence[Tensor]], length: int) -> list[tuple[Tensor, ...]]:
    """Operands, stacked `[L, ...]` or a tensor a block, as one tuple of operands a block."""
    if not operands:
        return [()] * length
    return list(zip(*(each.unbind(0) if isinstance(each, Tensor) else each for each in operands), strict=True))
