"""Block by block: the reference, and the way out when an iteration does not converge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pcr_fx.body import Program
from pcr_fx.kernels import ChainKernel
from pcr_fx.solvers.outcome import Outcome, SolveStats


def solve_sequential(
    program: Program,
    initial: Tensor,
    operands: Sequence[Tensor],
    shared: Sequence[Tensor],
    kernel: ChainKernel | None = None,
    length: int | None = None,
) -> tuple[Tensor, SolveStats]:
    """The trajectory `[L, *batch, d]` from `initial` `[*batch, d]`, one block after another: by `kernel` if given.

    With `length` only so many blocks, whose operands are given.
    """
    if kernel is not None and kernel.is_ready("forward", initial):
        return kernel.solve(initial, operands, shared), SolveStats(Outcome.SEQUENTIAL)
    layout, body, trajectory = program.layout, program.chain.body.forward, []
    states = layout.unflatten(initial)
    for block in blocks(operands, length or program.length):
        # In the model's own ops: PyTorch dispatches them faster than the aten ops they are made of.
        states = body(*states, *block, *shared)
        trajectory.append(layout.flatten(states))
    return torch.stack(trajectory), SolveStats(Outcome.SEQUENTIAL)


def blocks(operands: Sequence[Tensor | Sequence[Tensor]], length: int) -> list[tuple[Tensor, ...]]:
    """Operands, stacked `[L, ...]` or a tensor a block, as one tuple of operands a block."""
    if not operands:
        return [()] * length
    return list(zip(*(each.unbind(0) if isinstance(each, Tensor) else each for each in operands), strict=True))
