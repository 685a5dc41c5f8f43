"""Kernels where a block is too large for a thread: one program works on it, tile by tile."""
