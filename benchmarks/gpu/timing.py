"""Times of calls on a GPU: by CUDA events, warm, in CUDA graphs where that is possible."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

# Calls between two events: the events themselves cost about a microsecond.
_CALLS = 10


def replayed(function: Callable[[], Any]) -> Callable[[], Any]:
    """`function` captured in a CUDA graph; itself where there is no GPU."""
    if not torch.cuda.is_available():
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def median_us(function: Callable[[], Any], budget_s: float = 0.4) -> float:
    """The median time of a call in microseconds, warm: of at least three measurements, then as many as time allows.

    Without a GPU nothing is measured, and one call will do.
    """
    if not torch.cuda.is_available():
        return _once_us(function, 1)
    function()
    calls = _CALLS if _once_us(function, 1) < 1e3 else 1
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (len(times) < 100 and time.perf_counter() - began < budget_s):
        times.append(_once_us(function, calls))
    return statistics.median(times)


def _once_us(function: Callable[[], Any], calls: int) -> float:
    """The mean of some calls one after another, in microseconds."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        for _ in range(calls):
            function()
        return 1e6 * (time.perf_counter() - began) / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / calls
