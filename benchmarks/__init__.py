"""Benchmarks: each module is a command that prints a table and records it under `benchmarks/results/`."""
