"""Triton kernels of whole chains: their source, their build and cache, and how they are called."""

from pcr_fx.kernels.gpu.gpu_kernel import MAX_DIMENSION, GpuKernel

__all__ = ["MAX_DIMENSION", "GpuKernel"]
