"""Bounds on what a way through a chain costs: enough to tell what need not be measured.

They are wide on purpose. A way is left out where the least that it could cost is more than the most that another one
could; everything between is measured.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from pcr_fx.solvers import linearisation
from pcr_fx.ways.case import Case

Bounds: TypeAlias = tuple[float, float]


@dataclass(frozen=True)
class Rates:
    """Seconds that things take on some kind of device.

    Attributes:
        op: calling one of PyTorch's ops.
        arithmetic: an arithmetic operation in those ops, in small and in large products.
        kernel: one in a kernel.
        launch: calling a kernel.
        block: a block's latency in a kernel.
    """

    op: float
    arithmetic: float
    kernel: float
    launch: float
    block: float


# The least and the most.
RATES = {
    "cpu": (Rates(1.5e-6, 1e-12, 1e-12, 1e-5, 0.0), Rates(3e-5, 2e-9, 2e-9, 2e-4, 0.0)),
    "cuda": (Rates(2e-6, 1e-14, 1e-13, 5e-6, 2e-8), Rates(2e-5, 1e-10, 1e-9, 1e-4, 5e-6)),
}
# Ops of an iteration beside those of its blocks.
_ITERATION_OPS = 20
# A pullback takes about twice as long as the block.
_TIMES = {"forward": 1, "backward": 3}


def in_kernel(case: Case, direction: str) -> Bounds:
    """Block by block in a kernel."""

    def seconds(rates: Rates) -> float:
        each = rates.block + _TIMES[direction] * _work(case) * rates.kernel
        return rates.launch + case.program.length * each

    return _both(case, seconds)


def in_ops(case: Case, direction: str) -> Bounds:
    """Block by block in PyTorch's ops."""

    def seconds(rates: Rates) -> float:
        each = len(case.program.ops) * rates.op + _work(case) * rates.arithmetic
        return _TIMES[direction] * case.program.length * each

    return _both(case, seconds)


def reduction(case: Case, fused: bool) -> Bounds:
    """One transposed reduction for the whole adjoint, fused in a kernel or in PyTorch's ops."""
    return _both(case, lambda rates: _system(case, "newton", "backward", rates, fused))


def iteration(case: Case, solver: str, fused: bool, window: int | None) -> Bounds:
    """An iterative solver forward, on windows of so many blocks, fused in a kernel or in PyTorch's ops."""
    length, kind = case.program.length, linearisation(solver)
    share = (window or length) / length
    fewest, worst = _both(case, lambda rates: _system(case, solver, "forward", rates, fused, share))
    return math.ceil(kind.fewest / share) * fewest, math.ceil(kind.most / share) * worst


def _both(case: Case, seconds: Callable[[Rates], float]) -> Bounds:
    kind = case.program.signature.states[0].device.type
    least, most = RATES.get(kind, RATES["cpu"])
    if kind == "cpu":
        fastest = _PEAK_SHARE * _arithmetic_seconds(torch.get_num_threads())
        least = replace(least, arithmetic=max(least.arithmetic, fastest), kernel=max(least.kernel, fastest))
    return seconds(least), seconds(most)


# What nothing beats: a part of what an operation takes in a product of matrices that fit into the caches.
_PEAK_SHARE = 0.5
_PEAK_SIZE, _PEAK_CALLS = 256, 5


@functools.cache
def _arithmetic_seconds(threads: int) -> float:
    """Seconds of an arithmetic operation here at its fastest, in float32: a millisecond's work, once."""
    a = torch.ones(_PEAK_SIZE, _PEAK_SIZE, device="cpu")
    times = []
    with torch.inference_mode():
        for _ in range(_PEAK_CALLS):
            began = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - began)
    return min(times) / (2 * _PEAK_SIZE**3)


def _work(case: Case) -> int:
    """Arithmetic operations of a block, over all samples."""
    return max(case.samples, 1) * case.sample_operations


def _system(case: Case, solver: str, direction: str, rates: Rates, fused: bool, share: float = 1.0) -> float:
    """The linear system of this share of the blocks: linearised and solved."""
    program, kind = case.program, linearisation(solver, case.options.diagonal_probes)
    d = program.dimension
    solving = d**3 if kind.entries(d) > d else d
    times = _TIMES[direction] + 2 * kind.pullbacks(d)
    work = program.length * max(case.samples, 1) * (case.sample_operations * times + 2 * solving)
    ops = 1 if fused else _ITERATION_OPS + len(program.ops)
    return ops * rates.op + share * work * (rates.kernel if fused else rates.arithmetic)
