"""Blocks that are alike, whatever they do: a compiler that takes regions compiles one body for them, and calls it for each.

Less is asked of them than of a chain. What each block takes from outside is an argument of its call, and its calls stand where the
blocks stood: they need not feed each other, may draw random numbers, and may update running statistics.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from pcr_fx.graphs.effects import hides_ops, is_barrier, is_random
from pcr_fx.graphs.nodes import hashable, op_name
from pcr_fx.operands import is_ordinary
from pcr_fx.passes.bindings import OpSequence
from pcr_fx.passes.describe import describe_source, module_range
from pcr_fx.passes.periods import Run, find_runs
from pcr_fx.passes.phases import best_phase

# The fewest blocks that are worth a body of their own.
LEAST_BLOCKS = 3
# The fewest ops of a body: a call costs some microseconds, and nothing is fused across it. Several blocks may make up one body.
LEAST_OPS = 8
# Bytes that code for vectors may take for granted that a tensor's place in its memory is a multiple of.
_ALIGNMENT = 64
# Ops that change how others run, within which a region may stand.
_KNOWN_BARRIERS = ("enter_autocast", "exit_autocast", "set_grad_enabled")


@dataclass(frozen=True, eq=False)
class Block:
    """Ops that stand in a row.

    Attributes:
        ops: in order.
        inputs: what they take from outside, each once, in the order that they name it in.
        autocast: the ops that switched autocast before them, and for them.
    """

    ops: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    autocast: tuple[fx.Node, ...] = ()


@dataclass(eq=False)
class Region:
    """Blocks that are one function of their inputs.

    Attributes:
        outputs: the ops, by number, whose results are read outside of some block.
        written: the inputs, by number, that the blocks write to: nobody else has their memory.
    """

    blocks: list[Block] = field(default_factory=list)
    outputs: tuple[int, ...] = ()
    written: tuple[int, ...] = ()

    @property
    def modules(self) -> str:
        """Where the blocks stand in the model."""
        return module_range([self.blocks[0].ops, self.blocks[-1].ops])

    @property
    def source(self) -> str:
        """The line of the first block that says most."""
        return next(filter(None, map(describe_source, reversed(self.blocks[0].ops))), "")


def find_regions(graph: fx.Graph, attributes: Mapping[str, Any], with_gradients: bool = True) -> list[Region]:
    """The blocks of a captured graph that can each be one call of a common body.

    Args:
        attributes: the value of each `get_attr` target.
        with_gradients: whether regions may have a backward.
    """
    barriers = [node for node in graph.nodes if is_barrier(node)]
    if any(op_name(node) not in _KNOWN_BARRIERS for node in barriers):
        return []
    return _Finder(graph, OpSequence(graph, attributes, constants_first=False), with_gradients).regions()


@dataclass(frozen=True)
class _Inside:
    index: int


@dataclass(frozen=True)
class _Input:
    index: int


class _Irregular(Exception):
    """A block is none that a region may hold."""


class _Finder:
    def __init__(self, graph: fx.Graph, sequence: OpSequence, with_gradients: bool) -> None:
        self.sequence, self.with_gradients = sequence, with_gradients
        self.claimed: set[int] = set()
        self.barriers = dict(zip(graph.nodes, itertools.accumulate(map(is_barrier, graph.nodes)), strict=True))
        self.autocast = dict(_autocast_around(graph))

    def regions(self) -> list[Region]:
        kinds = [self.sequence.kinds.of(node) for node in self.sequence.ops]
        runs = [run for run in find_runs(kinds, LEAST_BLOCKS) if run.period >= LEAST_OPS]
        found: dict[Any, Region] = {}
        # The longest first, which hold the others; of those that are as long the one of the most blocks.
        for run in sorted(runs, key=lambda run: (run.start - run.stop, run.period)):
            for start, stop in list(self._unclaimed(run)):
                self._take(Run(start, stop, run.period), found)
        return [region for region in found.values() if self._complete(region)]

    def _unclaimed(self, run: Run) -> Iterator[tuple[int, int]]:
        free = (index for index in range(run.start, run.stop) if index not in self.claimed)
        for _, group in itertools.groupby(enumerate(free), key=lambda pair: pair[1] - pair[0]):
            stretch = [index for _, index in group]
            if len(stretch) >= LEAST_BLOCKS * run.period:
                yield stretch[0], stretch[-1] + 1

    def _take(self, run: Run, found: dict[Any, Region]) -> None:
        """Claim the blocks of a run of which there are enough."""
        first = run.start + best_phase(self.sequence, run)
        alike: dict[Any, list[tuple[int, Block]]] = {}
        for start in range(first, run.stop - run.period + 1, run.period):
            ops = tuple(self.sequence.ops[start : start + run.period])
            try:
                key, block = self._look(ops)
            except _Irregular:
                continue
            alike.setdefault(key, []).append((start, block))
        for key, blocks in alike.items():
            if key in found or len(blocks) >= LEAST_BLOCKS:
                region = found.setdefault(key, Region())
                region.blocks += [block for _, block in blocks]
                for start, _ in blocks:
                    self.claimed.update(range(start, start + run.period))

    # --- what a block is --------------------------------------------------------------------------------------------

    def _look(self, ops: tuple[fx.Node, ...]) -> tuple[Any, Block]:
        """What two blocks of one function have in common, and the block.

        Raises:
            _Irregular: it holds what a region may not, or nobody can say what it holds.
        """
        inside = {node: _Inside(index) for index, node in enumerate(ops)}
        inputs: dict[fx.Node, _Input] = {}

        def leaf(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return inside.get(value) or inputs.setdefault(value, _Input(len(inputs)))
            # 0.0 equals -0.0, and is another number.
            return value.hex() if isinstance(value, float) else value

        if any(node.op == "call_module" or hides_ops(node) or is_barrier(node) for node in ops):
            raise _Irregular
        if any("recompute" in node.meta for node in ops) and any(map(is_random, ops)):
            raise _Irregular  # the backward of a region would draw other numbers than its forward
        try:
            wiring = tuple((node.op, node.target, hashable([node.args, node.kwargs], leaf)) for node in ops)
            hash(wiring)
        except TypeError:
            raise _Irregular from None
        block = Block(ops, tuple(inputs), self.autocast[ops[0]])
        given = tuple(_look_at(self.sequence.value(node)) for node in inputs)
        values = [self.sequence.value(node) for node in inputs]
        if None in given or len({id(value) for value in values}) < len(values):
            raise _Irregular  # of one tensor that is two arguments a tracer makes one
        differentiable = tuple(getattr(self.sequence.value(node), "requires_grad", None) for node in ops)
        if any(differentiable) and not self.with_gradients:
            raise _Irregular
        return (wiring, given, differentiable, self.barriers[ops[0]], self._written(block)), block

    def _written(self, block: Block) -> tuple[int, ...]:
        """The inputs that a block writes to.

        Raises:
            _Irregular: others may see what is written.
        """
        own = set(block.ops)
        written = []
        for index, node in enumerate(block.inputs):
            writers = self.sequence.writers.get(node, [])
            if own.isdisjoint(writers):
                continue
            others = {alias for alias, those in self.sequence.writers.items() if those is writers} - own
            is_apart = others == {node} and node.op in ("placeholder", "get_attr") and own.issuperset(node.users)
            if not is_apart or not own.issuperset(writers) or self.sequence.value(node).requires_grad:
                raise _Irregular
            written.append(index)
        return tuple(written)

    # --- what leaves the blocks -------------------------------------------------------------------------------------

    def _complete(self, region: Region) -> bool:
        """Find what leaves the blocks; whether they may be calls."""
        if len(region.blocks) < LEAST_BLOCKS:
            return False
        region.blocks.sort(key=lambda block: self.sequence.position[block.ops[0]])
        leaving = {index for block in region.blocks for index in _leaving(block)}
        region.outputs = tuple(sorted(leaving))
        region.written = self._written(region.blocks[0])
        return bool(leaving) and all(self._lie_apart(block, region) for block in region.blocks)

    def _lie_apart(self, block: Block, region: Region) -> bool:
        """Whether what leaves a block are tensors in memory of their own."""
        leaving = [self.sequence.value(block.ops[index]) for index in region.outputs]
        given = [self.sequence.value(node) for node in block.inputs]
        if not all(map(_look_at, leaving)) or not all(isinstance(value, torch.Tensor) for value in leaving):
            return False
        apart = [value.untyped_storage()._cdata for value in leaving]
        taken = {value.untyped_storage()._cdata for value in given if isinstance(value, torch.Tensor)}
        return len(set(apart)) == len(apart) and taken.isdisjoint(apart)


def _leaving(block: Block) -> Iterator[int]:
    """The ops, by number, whose results are read outside."""
    own = set(block.ops)
    return (index for index, node in enumerate(block.ops) if not own.issuperset(node.users))


def _look_at(value: Any) -> Any:
    """All that a compiler makes a body for of an input; `None` of what may be none."""
    if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
        return "size", str(value)
    if not isinstance(value, torch.Tensor) or not is_ordinary(value) or value.layout is not torch.strided:
        return None
    layout = str(tuple(value.shape)), str(value.stride()), str(value.storage_offset() * value.itemsize % _ALIGNMENT)
    return *layout, value.dtype, value.device, value.requires_grad, value.is_conj(), value.is_neg()


def _autocast_around(graph: fx.Graph) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...]]]:
    """Each node with the ops that have switched autocast for it."""
    around: tuple[fx.Node, ...] = ()
    for node in graph.nodes:
        yield node, around
        if is_barrier(node) and op_name(node) == "enter_autocast":
            around = (*around, node)
        elif is_barrier(node) and op_name(node) == "exit_autocast":
            around = tuple(one for one in around if one is not node.args[0])
