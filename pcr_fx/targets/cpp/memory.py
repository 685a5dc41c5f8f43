"""Memory for what kernels return."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Tensors from here on hold at least one huge page. Up to 32 MiB glibc may take them from its heap, where the pages stay huge
# for whatever lies there next; larger ones are mappings of their own.
LARGE = 2**22


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of the device of `like`, and of its dtype if no other is given; a large one on a CPU in huge
    pages, where there are.

    All gradients or states of a chain are one result, which is written once: a page fault for each 4 KiB of it costs more
    than computing it. 512 MiB took 215 ms to fill and to free, and 32 ms in pages of 2 MiB. Linux gives those to who
    asks (`transparent_hugepage` at its usual setting, `madvise`); elsewhere this is a plain `new_empty`.
    """
    made = like.new_empty(shape, dtype=dtype)
    if made.nbytes >= LARGE and made.is_cpu and (advise := _advice()):
        start = -(-made.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(start, (made.data_ptr() + made.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE)
    return made


def copied_block(trajectory: Tensor, block: int) -> Tensor:
    """One block's state of a contiguous `[L, ...]` on a CPU, as a tensor of its own: a tenth of what two ops cost."""
    made = trajectory.new_empty(trajectory.shape[1:])
    size = made.nbytes
    ctypes.memmove(made.data_ptr(), trajectory.data_ptr() + block * size, size)
    return made


@functools.cache
def _advice() -> Callable[[int, int], None] | None:
    """`madvise(..., MADV_HUGEPAGE)`, if this system has it; whether it is followed is its own business."""
    huge = getattr(mmap, "MADV_HUGEPAGE", None)
    if huge is None:
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return lambda start, size: madvise(start, size, huge)
