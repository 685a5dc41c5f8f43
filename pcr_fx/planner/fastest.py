"""The fastest ways of what was measured, and whether the model's own ops are as fast as these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pcr_fx.planner.choice import HANDING, STACKING, Choice, Timing
from pcr_fx.planner.rule import estimated_choice
from pcr_fx.ways import EAGER, Backward, Case, Forward, candidates

# What is rewritten has to gain 5 %: what is closer to eager is decided by noise.
_WORTHWHILE = 0.95
# And beside one op of PyTorch's for the whole, as `torch.lstm`, this much: a node does more beside its solver than that does (an
# LSTM of 16 over 1,024 steps trained in 2.1 ms where 1.4 had been timed, and PyTorch's in 1.8 of 1.85).
_WORTHWHILE_BESIDE_OP = 0.7
# And what threads share has to gain this much on one thread: they may not always find a core each.
_SHARED = 1.1


def fastest_ways(case: Case, timings: Sequence[Timing], needs_gradient: bool) -> Choice:
    """The fastest way of each direction; and whether the model's own ops are about as fast as these."""
    seconds = {(t.direction, t.way): t.seconds for t in timings if t.seconds is not None}
    rule = estimated_choice(case)
    guesses: dict[str, Any] = {"forward": rule.forward, "backward": rule.backward}
    directions = ("forward", "backward") if needs_gradient else ("forward",)

    def cost(direction: str, way: Forward | Backward | None) -> float:
        found = math.inf if way is None else seconds.get((direction, way.name), math.inf)
        return found if way is None or not way.is_shared(case, direction) else _SHARED * found

    def beside(direction: str, name: str) -> float:
        found = [t.seconds for t in timings if (t.direction, t.way) == (direction, name)]
        return 0.0 if not found else math.inf if found[0] is None else found[0]

    def more(name: str) -> float:
        """What it costs to add gradients to others."""
        return sum((t.adding or 0.0) - (t.seconds or 0.0) for t in timings if t.way == name and t.adding is not None)

    chosen: dict[str, Any] = {}
    in_place: dict[str, Any] = {}
    for direction in directions:
        ways = [way for way in candidates(case, direction)[0] if (direction, way.name) in seconds]
        chosen[direction] = min(ways, key=lambda way: cost(direction, way), default=guesses[direction])
        in_place[direction] = min(
            (way for way in ways if way.in_place), key=lambda way: cost(direction, way), default=None
        )
    # Only where both ways read the blocks' tensors where they lie need these not be stacked.
    total = sum(cost(d, way) for d, way in chosen.items()) + beside("forward", STACKING)
    unstacked = sum(cost(d, way) for d, way in in_place.items())
    if unstacked <= total:
        chosen, total = {d: way or chosen[d] for d, way in in_place.items()}, unstacked
    total += beside("backward", HANDING)
    if math.isinf(total) and any(timing.skipped for timing in timings):
        alone = rule.leaves_alone(needs_gradient)
        reason = f"the budget ended before ways had been timed; {rule.reason}"
        return replace(rule, reason=reason, timings=tuple(timings), alone=((needs_gradient, alone),))
    eager = sum(seconds.get((direction, EAGER), math.inf) for direction in directions)
    # Who trains may add gradients to those that there are, or have none: neither may be slower than before.
    gain = _WORTHWHILE if case.program.chain.own_op is None else _WORTHWHILE_BESIDE_OP
    alone = any(gain * (eager + e) <= total + ours for e, ours in ((0.0, 0.0), (more(EAGER), more(HANDING))))
    reason = "the model's own ops are fastest of what was measured" if alone else "fastest of what was measured"
    backward = chosen.get("backward", rule.backward)
    return Choice(chosen["forward"], backward, reason, timings=tuple(timings), alone=((needs_gradient, alone),))


def joined(before: Choice | None, found: Choice, needs_gradient: bool, drifted: bool) -> Choice:
    """What was found, with what another measurement knows beside it."""
    if before is None or not before.timings:
        return found
    alone = {**dict(before.alone), **dict(found.alone)}
    if needs_gradient or True not in dict(before.alone):
        return replace(found, alone=tuple(alone.items()))
    # Ways are those of training; without gradients it only differs whether the chain is left alone.
    if not drifted:
        return replace(before, alone=tuple(alone.items()))
    timings = (*found.timings, *(t for t in before.timings if t.direction == "backward"))
    return replace(before, forward=found.forward, timings=timings)
