"""How the outputs of a chain are computed that native code runs: whichever manner takes the least time on a call's tensors.

The planner times ways through the states alone. What leaves a chain beside them may cost more than these: a readout is one product
for all blocks at once, and in a sweep one of few rows at each.
"""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from pcr_fx.operands import Given, Operand, first_part, parts_of, stacked
from pcr_fx.planner import Choice
from pcr_fx.planner.rounds import least_in_turn
from pcr_fx.ways import EAGER

# Scalar operations of a block's outputs, over all samples, below which a sweep is fastest in any case.
HEAVY = 20_000
# Calls of each manner, which take turns.
_ROUNDS = 3
# What is rewritten has to gain so much.
_WORTHWHILE = 0.95


class Manner(enum.Enum):
    """How outputs are computed."""

    SWEPT = "as the states are, in one sweep of native code"
    BEHIND = "for all blocks at once, behind the states"
    AS_WRITTEN = "by the blocks as the model wrote them, states and all"


Run = Callable[[Given], Sequence[Tensor | list[Tensor]]]


def fastest_manner(
    manners: Mapping[Manner, Run], as_written: Run, given: Given, choice: Choice, budget: float
) -> Manner:
    """The manner that takes the least time: a forward, and its backward where gradients are on.

    Args:
        manners: those that there are.
        as_written: called only where these take longer than what was measured of the model's own ops, which is without outputs.
        given: what a call was given.
        choice: of the chain's ways.
        budget: seconds after which no further round begins.
    """
    own = _apart(given)
    taken = least_in_turn({manner: partial(_seconds, run, own) for manner, run in manners.items()}, _ROUNDS, budget)
    fastest = min(taken, key=taken.__getitem__)
    if taken[fastest] > _WORTHWHILE * _without_outputs(choice):
        manner = Manner.AS_WRITTEN
        written = least_in_turn({manner: partial(_seconds, as_written, own)}, _ROUNDS - 1, budget)
        if taken[fastest] > _WORTHWHILE * written[manner]:
            return manner
    return fastest


def _without_outputs(choice: Choice) -> float:
    """Seconds of a call of the model's own ops, as they were measured; infinite where they were not."""
    directions = ("forward", "backward") if torch.is_grad_enabled() else ("forward",)
    known = {timing.direction: timing.seconds for timing in choice.timings if timing.way == EAGER}
    return sum(known.get(direction) or math.inf for direction in directions)


def _apart(given: Given) -> Given:
    """The same numbers in tensors that nobody else knows: no hook of theirs is called, and no gradient of theirs taken."""

    def leaf(tensor: Tensor, asked: bool) -> Tensor:
        return tensor.detach().requires_grad_(asked and torch.is_grad_enabled())

    def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [leaf(one, one.requires_grad) for one in tensors]

    def operands(those: Sequence[Operand]) -> list[Tensor]:
        with torch.no_grad():
            whole = [stacked(one) for one in those]
        return [leaf(one, _is_asked(operand)) for one, operand in zip(whole, those, strict=True)]

    return Given(
        leaves(given.states),
        operands(given.operands),
        leaves(given.shared),
        operands(given.head_operands),
        leaves(given.head_shared),
    )


def _is_asked(operand: Operand) -> bool:
    parts = [operand] if isinstance(operand, Tensor) else parts_of(operand)
    return first_part(operand).is_floating_point() and any(part.requires_grad for part in parts)


def _seconds(run: Run, given: Given) -> float:
    began = time.perf_counter()
    values = [one for value in run(given) for one in (value if isinstance(value, list) else [value])]
    taken = time.perf_counter() - began
    moving = [one for one in values if one.requires_grad]
    leaves = [one for group in given for one in group if isinstance(one, Tensor) and one.requires_grad]
    if moving and leaves:
        ones = [torch.ones_like(one) for one in moving]
        began = time.perf_counter()
        torch.autograd.grad(moving, leaves, ones, allow_unused=True)
        taken += time.perf_counter() - began
    return taken
