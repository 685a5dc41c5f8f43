"""Native kernels of whole chains: their source, their build and cache, and the tensors they are called with."""

from pcr_fx.targets.cpp.build import CompilerError
from pcr_fx.targets.cpp.kernel import Column, CppKernel
from pcr_fx.targets.cpp.pointers import PointerTable
from pcr_fx.targets.triton.kernel import TritonKernel

__all__ = ["Column", "CompilerError", "CppKernel", "PointerTable", "TritonKernel"]
