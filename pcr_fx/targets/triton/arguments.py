"""The tensors of a call as a GPU's kernels are given them."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from pcr_fx.call import Call
from pcr_fx.targets.kernel import as_real


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous, from where a GPU can read several numbers at once: kernels that do are much slower elsewhere."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


class Arguments:
    """Those of one call, all contiguous and aligned.

    Attributes:
        initial, operands, shared: those of the call.
        trajectory: `[L, *batch, d]`; the adjoint's kernels read it.
        cotangents: of every state, `[L, *batch, d]`; likewise.
    """

    def __init__(self, call: Call, trajectory: Tensor | None = None, cotangents: Tensor | None = None) -> None:
        self.initial = aligned(call.initial)
        self.operands = [aligned(as_real(tensor, call.initial.dtype)) for tensor in call.operands]
        self.shared = [aligned(as_real(tensor, call.initial.dtype)) for tensor in call.shared]
        self.trajectory = None if trajectory is None else aligned(trajectory)
        self.cotangents = None if cotangents is None else aligned(cotangents)

    @property
    def samples(self) -> int:
        d = self.initial.shape[-1]
        return self.initial.numel() // d

    @cached_property
    def packed(self) -> Tensor:
        """A row `[L]` for each number of the operands, of the trajectory and of the cotangents."""
        states = [states for states in (self.trajectory, self.cotangents) if states is not None]
        rows = [tensor.reshape(len(tensor), -1).mT for tensor in (*self.operands, *states)]
        return torch.cat(rows) if rows else self.initial.new_empty(0)
