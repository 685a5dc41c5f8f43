"""Timing and recording that the benchmarks share."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

RESULTS = Path(__file__).parent / "results"
Call = Callable[[], Any]


def median_ms(function: Call, repeats: int = 9) -> float:
    """The median time of a call in milliseconds, after two calls to warm up."""
    function()
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def least_ms(turns: Sequence[Call], rounds: int, turn_seconds: float = 0.0) -> list[float]:
    """The least time of each of these calls, which take turns, in milliseconds.

    Args:
        turn_seconds: for how long each is called again in its turn, at least once: short calls are not to be measured with what
            the others left in the caches.
    """
    for call in turns:
        call()
        call()
    times = [math.inf for _ in turns]
    for _ in range(rounds):
        for index, call in enumerate(turns):
            end = time.perf_counter() + turn_seconds
            while True:
                began = time.perf_counter()
                call()
                now = time.perf_counter()
                times[index] = min(times[index], 1e3 * (now - began))
                if now >= end:
                    break
    return times


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def record(name: str, title: str, headers: Sequence[str], rows: Sequence[Sequence[Any]], notes: str) -> None:
    """Print a table, and write it to `results/NAME.md` and `results/NAME.json`."""
    machine = f"{processor()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, Python {platform.python_version()}"
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    text = f"# {title}\n\n{machine}.\n\n{table}\n\n{notes}\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    data = {"title": title, "machine": machine, "headers": list(headers), "rows": [list(row) for row in rows]}
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
