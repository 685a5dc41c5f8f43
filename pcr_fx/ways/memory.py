"""How much memory linear systems may take, and in how large windows they are solved to keep within it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pcr_fx.body import Program
from pcr_fx.solvers import linearisation

# The share of what is free that the linear systems of one chain may take where nobody set a limit.
DEFAULT_SHARE = 0.25
# Copies of a linear system's matrices, and of the states, that a solve holds at a time.
_MATRIX_COPIES = 3
_STATE_COPIES = 8
# A window of fewer blocks is no faster than the blocks one after another.
MIN_WINDOW = 8


def free_bytes(device: torch.device) -> int:
    """Memory that is free on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def in_units(count: int) -> str:
    """Bytes for people: 1.5 KiB."""
    amount, units = float(count), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while amount >= 1024 and unit != "GiB":
        amount, unit = amount / 1024, next(units)
    return f"{amount:.4g} {unit}"


def memory_limit(given: int | None, device: torch.device) -> int:
    """The limit that a user gave, or a share of what is free."""
    return given if given is not None else int(DEFAULT_SHARE * free_bytes(device))


def block_bytes(solver: str, program: Program, samples: int) -> int:
    """Memory that a solve needs for each block that it holds."""
    entries = linearisation(solver).entries(program.dimension)
    numbers = samples * (_MATRIX_COPIES * entries + _STATE_COPIES * program.dimension)
    return numbers * program.dtype.itemsize


def fitting_window(solver: str, program: Program, samples: int, limit: int, asked: int | None) -> int | None:
    """Blocks that may be solved at a time: at most `asked`, and no more than fit. `None` where too few do."""
    length = program.length
    window = min(asked or length, length, limit // max(block_bytes(solver, program, samples), 1))
    return window if window >= min(MIN_WINDOW, asked or length, length) else None
