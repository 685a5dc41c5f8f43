"""Triton kernels of whole chains: their source, their build and cache, and how they are called."""

from pcr_fx.targets.triton.kernel import MAX_DIMENSION, TritonKernel

__all__ = ["MAX_DIMENSION", "TritonKernel"]
