"""Kernels where a block is too large for a thread, and one program works on it tile by tile."""
