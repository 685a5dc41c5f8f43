"""Where within the period of a run its blocks are cut."""

from __future__ import annotations

import operator

import torch
from torch import fx

from pcr_fx.graphs.nodes import op_name
from pcr_fx.passes.bindings import OpSequence
from pcr_fx.passes.describe import common_modules
from pcr_fx.passes.periods import Run

# A cut through an op that returns several tensors would carry the tuple: any other cut is better.
_TUPLE_COST = 1000
# Of two cuts that are as good, one through values that are read behind the run as well: those are states then.
_READ_GAIN = 1 / 1024


def best_phase(sequence: OpSequence, run: Run) -> int:
    """Where within the period to cut: where the fewest values are carried over, then for the most blocks, then

    where a module begins.
    """
    live = _live(sequence, run)
    # In the middle of the run the ends do not show.
    whole = (run.stop - run.start) // run.period
    middle = whole // 2 * run.period
    remainder = (run.stop - run.start) - whole * run.period
    costs = [live[min(middle + phase, len(live) - 1)] for phase in range(run.period)]
    least = [phase for phase, cost in enumerate(costs) if cost == min(costs)]

    def preference(phase: int) -> tuple[bool, int, int]:
        block = sequence.ops[run.start + max(middle - run.period, 0) + phase :][: run.period]
        return phase > remainder, -len(common_modules(block)), phase

    return min(least, key=preference)


def _live(sequence: OpSequence, run: Run) -> list[float]:
    """For each cut through the run what is handed over it; what is only collected behind the run is not."""
    live = [0.0] * (run.stop - run.start + 1)
    for index in range(run.start, run.stop):
        users = [sequence.position.get(user, run.stop) for user in sequence.ops[index].users]
        within = [user for user in users if user < run.stop]
        last = max(within, default=index)
        weight = _TUPLE_COST if _is_tuple(sequence, sequence.ops[index]) else 1.0
        if len(within) < len(users):
            weight -= _READ_GAIN
        live[index - run.start + 1] += weight
        live[last - run.start + 1] -= weight
    for index in range(1, len(live)):
        live[index] += live[index - 1]
    return live


def _is_tuple(sequence: OpSequence, node: fx.Node) -> bool:
    value = sequence.value(node)
    if value is not None:
        return not isinstance(value, torch.Tensor)
    return bool(node.users) and all(
        user.target is operator.getitem and isinstance(user.args[1], int) and op_name(node) != "getitem"
        for user in node.users
    )
