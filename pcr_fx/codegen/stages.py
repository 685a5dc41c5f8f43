"""A body in two stages: what can be computed for all blocks at once, and what has to wait for the block before.

Forward, that is what reads no state, such as `x @ w` of a recurrence's inputs; backward, where all states are known, also
what reads these: all but what a cotangent goes through. Targets evaluate the first stage for many blocks at a time, so that
weights which all blocks share are read once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from pcr_fx.codegen.check import check, is_checking
from pcr_fx.codegen.ir import Buffer, Function, Loop, map_views, views

# Multiplications with what all blocks share for each number that is handed from one stage to the other, or brought into the
# order of blocks, below which the two stages are no faster than one.
_MULTIPLICATIONS_A_NUMBER = 8


@dataclass(frozen=True)
class Stages:
    """A function in two parts.

    Attributes:
        early: of the inputs that are known for all blocks; each block has its own of those that are varying here.
        late: the function, given what the early one returns behind its own inputs.
    """

    early: Function
    late: Function

    @property
    def numbers(self) -> int:
        """How many are handed from one to the other, of a block and sample."""
        return sum(buffer.size for buffer in self.early.outputs)


def split(function: Function, known: Sequence[bool], shared: Sequence[bool]) -> Stages | None:
    """The stages of a function; `None` where it had better stay whole.

    Args:
        known: for each input whether it is known for all blocks before the first is evaluated.
        shared: for each input whether it is the same in all blocks.
    """
    waiting = [buffer.name for buffer, is_known in zip(function.inputs, known, strict=True) if not is_known]
    of_blocks = [buffer.name for buffer, is_shared in zip(function.inputs, shared, strict=True) if not is_shared]
    late, own = _late(function, waiting, of_blocks)
    read = {view.buffer for loop in function.loops if loop.out.buffer.name in late for view in views(loop.value)}
    handed = [one for one in function.locals if one in read and one.name not in late and one.name in own]
    early = _needed(function, {one.name for one in handed}, ())
    given = {view.buffer.name for loop in early for view in views(loop.value)}
    inputs = [one for one, is_known in zip(function.inputs, known, strict=True) if is_known and one.name in given]
    moved = sum(one.size for one in (*handed, *inputs) if one.name in own)
    if sum(_multiplications(loop, own) for loop in early) < max(1, _MULTIPLICATIONS_A_NUMBER * moved):
        return None
    names = {one.name for one in handed}
    late_loops = _needed(function, {one.name for one in function.outputs}, names)
    stages = Stages(
        Function(
            tuple(_of_blocks(one, own) for one in inputs),
            tuple(_of_blocks(one, own) for one in handed),
            tuple(_loop_of_blocks(loop, own) for loop in early),
        ),
        Function((*function.inputs, *handed), function.outputs, late_loops),
    )
    if is_checking():
        check(stages.early)
        check(stages.late)
    return stages


def _late(function: Function, waiting: Collection[str], of_blocks: Collection[str]) -> tuple[set[str], set[str]]:
    """The buffers that have to wait, and those of which each block has its own, by name."""
    late, own = {*waiting, *(one.name for one in function.outputs)}, set(of_blocks)
    known = -1
    while known != len(late) + len(own):  # a part of a buffer may have to wait that is written behind another
        known = len(late) + len(own)
        for loop in function.loops:
            read = {view.buffer.name for view in views(loop.value)}
            if read & own:
                own.add(loop.out.buffer.name)
            if read & late or _reads_matrices(loop, own):
                late.add(loop.out.buffer.name)
    return late, own


def _reads_matrices(loop: Loop, own: Collection[str]) -> bool:
    """Whether a sum reads something of a block's that is not much smaller than the work: each number of it is used once."""
    work = math.prod((*loop.shape, *loop.reduced))
    sizes = [view.buffer.size for view in views(loop.value) if view.buffer.name in own]
    return bool(loop.reduced) and any(size * _MULTIPLICATIONS_A_NUMBER > work for size in sizes)


def _multiplications(loop: Loop, own: Collection[str]) -> int:
    """Those of a sum over products with what all blocks share."""
    names = [view.buffer.name for view in views(loop.value)]
    is_product = any(name in own for name in names) and any(name not in own for name in names)
    return math.prod((*loop.shape, *loop.reduced)) if loop.reduced and is_product else 0


def _needed(function: Function, wanted: Collection[str], given: Collection[str]) -> tuple[Loop, ...]:
    """The loops that some buffers need, where others are given."""
    needed, loops = set(wanted), []
    for loop in reversed(function.loops):
        if loop.out.buffer.name in needed:
            loops.append(loop)
            needed.update({view.buffer.name for view in views(loop.value)} - set(given))
    return tuple(reversed(loops))


def _of_blocks(buffer: Buffer, own: Collection[str]) -> Buffer:
    return replace(buffer, varying=buffer.name in own)


def _loop_of_blocks(loop: Loop, own: Collection[str]) -> Loop:
    out = replace(loop.out, buffer=_of_blocks(loop.out.buffer, own))
    value = map_views(loop.value, lambda view: replace(view, buffer=_of_blocks(view.buffer, own)))
    return replace(loop, out=out, value=value)
