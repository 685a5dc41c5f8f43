"""Native kernels of whole chains: their source, their build and cache, and the tensors they are called with."""

from pcr_fx.kernels.build import CompilerError
from pcr_fx.kernels.chain_kernel import ChainKernel, Column
from pcr_fx.kernels.gpu.gpu_kernel import GpuKernel
from pcr_fx.kernels.pointers import PointerTable

__all__ = ["ChainKernel", "Column", "CompilerError", "GpuKernel", "PointerTable"]
