"""Where the parts of a per-block operand lie in memory: read once, then only checked.

Stacking 4,096 small parameters costs more than the chain that they belong to. A kernel reads them where they are, from a
table of addresses; before each call native code checks that none has moved, changed its shape, or its dtype.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pcr_fx.targets.cpp.build import CompilerError, load

_SOURCE = Path(__file__).parent / "native" / "pointers.cpp"
# What the stable C interface of PyTorch calls dtypes: those of its JIT.
_DTYPES = {torch.float32: 6, torch.float64: 7}


class PointerTable:
    """The addresses of `L` tensors of one shape and dtype, each contiguous.

    What lies there stays as long as the table does: another thread may give the tensors other memory during a call.

    Attributes:
        shape, dtype: of each.
        words: how a kernel is told of the table.
    """

    def __init__(self, tensors: Sequence[Tensor], offset: int) -> None:
        first = tensors[0]
        self.tensors = list(tensors)
        self.shape, self.dtype = first.shape, first.dtype
        count = len(tensors)
        self._memory = [tensor.untyped_storage() for tensor in tensors]
        self.addresses = (ctypes.c_void_p * count)(*map(address_in, self._memory, tensors))
        self.handles = (ctypes.c_void_p * count)(*(id(tensor) + offset for tensor in tensors))
        self.sizes = (ctypes.c_int64 * first.dim())(*first.shape)
        self.strides = (ctypes.c_int64 * first.dim())(*first.stride())
        self.words = (0, 0, ctypes.addressof(self.addresses))
        self._operand = _Operand(
            count,
            first.dim(),
            _DTYPES[first.dtype],
            0,
            *(ctypes.addressof(array) for array in (self.handles, self.addresses, self.sizes, self.strides)),
            *_interface(),
        )

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> PointerTable | None:
        """The table, or `None` where kernels cannot read these tensors in place."""
        first = tensors[0]
        for tensor in tensors:
            has_addresses = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"
            if not has_addresses or tensor.layout != torch.strided or not tensor.is_contiguous() or tensor.is_neg():
                return None
            if tensor.shape != first.shape or tensor.dtype != first.dtype or tensor.stride() != first.stride():
                return None
        offset = _offset()
        if first.dtype not in _DTYPES or offset is None or not _can_check(offset):
            return None
        return cls(tensors, offset)

    def holds(self) -> bool:
        """Whether every tensor is still where it was, with the same shape, strides and dtype."""
        return _checker()(ctypes.byref(self._operand)) == len(self.tensors)


def address_in(memory: torch.UntypedStorage, tensor: Tensor) -> int:
    """Where a tensor lies in `memory`, which was its own a moment ago."""
    return memory.data_ptr() + int(tensor.storage_offset()) * tensor.element_size()


class _Operand(ctypes.Structure):
    """All tensors of a per-block operand as native/pointers.cpp has them."""

    _fields_ = [
        ("count", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("tensors", "addresses", "sizes", "strides")),
        *((name, ctypes.c_void_p) for name in ("address_of", "dtype_of", "sizes_of", "strides_of")),
    ]


@functools.cache
def _offset() -> int | None:
    """Where in a tensor's Python object its C++ tensor lies."""
    probe = torch.empty(1, device="cpu")
    size = type(probe).__basicsize__
    words = ctypes.string_at(id(probe), size)
    needle = probe._cdata.to_bytes(8, "little")
    return next((offset for offset in range(0, size - 7, 8) if words[offset : offset + 8] == needle), None)


@functools.cache
def _interface() -> tuple[int, ...]:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"))
    names = ("data_ptr", "dtype", "sizes", "strides")
    return tuple(ctypes.cast(getattr(library, f"aoti_torch_get_{name}"), ctypes.c_void_p).value or 0 for name in names)


@functools.cache
def _can_check(offset: int) -> bool:
    """Whether there is a checker, and the layout of Python's tensors and the numbers of dtypes are as it takes for granted."""
    try:
        return all(PointerTable([torch.empty(2, 3, dtype=dtype, device="cpu")], offset).holds() for dtype in _DTYPES)
    except (CompilerError, OSError, AttributeError):
        return False


@functools.cache
def _checker() -> ctypes._NamedFuncPointer:
    library = load(_SOURCE.read_text())
    # Without letting other threads run meanwhile, who might move a tensor while it is looked at.
    function = ctypes.PyDLL(library._name, handle=library._handle).run
    function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    return function
