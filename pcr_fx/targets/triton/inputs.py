"""What the GPU's kernels of a chain read and write, whichever way they are printed."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from pcr_fx.call import Call

REALS = {torch.float32: "tl.float32", torch.float64: "tl.float64"}
# Iterations that are sent to the GPU, done or not, where each is launches of its own: nobody waits to see. Launches that find
# nothing to do cost some 1.1 us each. The iterations that chains need grow as the root of their length where rounding
# matters at all: 3 for 1,024 blocks x + W2 tanh(W1 x), 18 for 65,536. An adjoint is solved at once, and refined once.
_FEWEST_SENT = 12
_SENT_A_ROOT = 1 / 8
_SENT_BACKWARD = 2
# Lanes of the program that decides what becomes of a sample.
DECIDING_LANES = 256
HEADER = """
import triton
import triton.language as tl

from pcr_fx.targets.triton.functions import *  # noqa: F403
"""


def iterations_sent(direction: str, length: int, limit: int) -> int:
    """How many iterations to send of at most `limit`."""
    if direction == "adjoint":
        return min(limit, _SENT_BACKWARD)
    return min(limit, max(_FEWEST_SENT, math.ceil(_SENT_A_ROOT * math.sqrt(length))))


def words_of(dtype: torch.dtype) -> int:
    """Words of 64 bits that a number is sent in between programs: each holds 32 bits of it, and a tag."""
    return dtype.itemsize // 4


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous, from where a GPU can read several numbers at once: kernels that do are much slower elsewhere."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


class Arguments:
    """The tensors of a call as kernels are given them: all contiguous and aligned.

    Attributes:
        initial, operands, shared: those of the call.
        trajectory: `[L, *batch, d]`; the adjoint's kernels read it.
        cotangents: of every state, `[L, *batch, d]`; likewise.
    """

    def __init__(self, call: Call, trajectory: Tensor | None = None, cotangents: Tensor | None = None) -> None:
        self.initial = aligned(call.initial)
        self.operands = [aligned(tensor) for tensor in call.operands]
        self.shared = [aligned(tensor) for tensor in call.shared]
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
