"""What kernels of whole chains are printed for: C++ on a CPU, Triton on a GPU."""

from pcr_fx.targets.cpp.build import CompilerError
from pcr_fx.targets.cpp.kernel import CppKernel, Scattered
from pcr_fx.targets.cpp.pointers import PointerTable
from pcr_fx.targets.kernel import Kernel
from pcr_fx.targets.triton.kernel import TritonKernel

# Whose kernels run a chain on a kind of device.
KERNELS: dict[str, type[CppKernel] | type[TritonKernel]] = {"cpu": CppKernel, "cuda": TritonKernel}

__all__ = ["KERNELS", "CompilerError", "CppKernel", "Kernel", "PointerTable", "Scattered", "TritonKernel"]
