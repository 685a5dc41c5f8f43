"""What the fused kernels gain on a GPU, and its record."""
