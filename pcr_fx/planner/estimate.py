"""Bounds on what a way through a chain costs: enough to tell what need not be measured.

They are wide on purpose. A way is left out where the least that it could cost is more than the most that another one
could; everything between is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pcr_fx.planner.choice import Way
from pcr_fx.planner.rule import Case
from pcr_fx.solvers import linearisation


@dataclass(frozen=True)
class Rates:
    """The least and the most seconds, on some kind of device, that things take.

    Attributes:
        op: calling one of PyTorch's ops.
        arithmetic: an arithmetic operation in those ops, in small and in large products.
        kernel: one in a kernel.
        launch: calling a kernel.
        block: a block's latency in a kernel.
    """

    op: tuple[float, float]
    arithmetic: tuple[float, float]
    kernel: tuple[float, float]
    launch: tuple[float, float]
    block: tuple[float, float]


RATES = {
    "cpu": Rates((1.5e-6, 3e-5), (1e-12, 2e-9), (1e-12, 2e-9), (1e-5, 2e-4), (0.0, 0.0)),
    "cuda": Rates((2e-6, 2e-5), (1e-14, 1e-10), (1e-13, 1e-9), (5e-6, 1e-4), (2e-8, 5e-6)),
}
# Iterations until an iterative solver has converged, at the least and for what is left out at the most.
_ITERATIONS = {"newton": (2, 32), "quasi-newton": (3, 64), "picard": (3, 256), "jacobi": (3, 256)}
# Ops of an iteration beside those of its blocks.
_ITERATION_OPS = 20


def bounds(way: Way, direction: str, case: Case) -> tuple[float, float]:
    """The least and the most seconds that a call by `way` can cost."""
    least, most = (_seconds(way, direction, case, side) for side in (0, 1))
    return least, most


def _seconds(way: Way, direction: str, case: Case, side: int) -> float:
    rates = RATES.get(case.program.signature.states[0].device.type, RATES["cpu"])
    program, samples = case.program, max(case.samples, 1)
    blocks = program.length * samples
    times = 3 if direction == "backward" else 1
    work = block_operations(case)
    if way.solver == "sequential" and way.kernel is not None:
        arithmetic = times * work * blocks * rates.kernel[side]
        return rates.launch[side] + program.length * rates.block[side] + arithmetic
    if way.solver == "sequential":
        calls = times * program.length * len(program.ops) * rates.op[side]
        return calls + times * work * blocks * rates.arithmetic[side]
    d, kind = program.dimension, linearisation(way.solver, case.options.diagonal_probes)
    solving = d**3 if kind.entries(d) > d else d
    each = blocks * (work * (times + 2 * kind.pullbacks(d)) + 2 * solving)
    rate = rates.kernel[side] if way.kernel is not None else rates.arithmetic[side]
    ops = 1 if way.kernel is not None else _ITERATION_OPS + len(program.ops)
    if direction == "backward":
        return ops * rates.op[side] + each * rate
    iterations = _ITERATIONS[way.solver][side]
    if way.window is not None:
        iterations = math.ceil(iterations * program.length / way.window)
    return iterations * (ops * rates.op[side] + each * rate * min(1.0, (way.window or program.length) / program.length))


def block_operations(case: Case) -> int:
    """Arithmetic operations of a block on one sample: counted where there is a kernel, else guessed from its sizes."""
    counted = getattr(case.kernel, "operations", None)
    if counted is not None:
        return max(counted[0], 1)
    program = case.program
    batch = max(case.samples, 1)
    weights = sum(math.prod(spec.shape) for spec in (*program.signature.operands, *program.signature.shared))
    # A weight is used once a sample, at the least; an operand of each sample has its share of them.
    return 2 * weights // batch + len(program.ops) * program.dimension + 1
