"""Kernels where all numbers of a block fit in a thread's registers: written out, number by number."""
