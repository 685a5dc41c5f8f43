"""Kernels where all numbers of a block fit in a thread's registers, and are written out one by one."""
