"""What each argument of an op is in terms of its block: the wiring that isomorphic blocks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from pcr_fx.graphs.effects import is_random, written_memory
from pcr_fx.graphs.nodes import op_name
from pcr_fx.passes.describe import describe_source, module_range
from pcr_fx.passes.kinds import Kinds, flatten_arguments
from pcr_fx.passes.open_sizes import is_argument


@dataclass(frozen=True)
class Inside:
    """The result of op `index` of the same block."""

    index: int


@dataclass(frozen=True)
class Carried:
    """The result of op `index` of the block `lag` before."""

    lag: int
    index: int


@dataclass(frozen=True)
class Outside:
    """A node that belongs to no block; another one in each block, or the same."""

    node: fx.Node


@dataclass(frozen=True)
class Literal:
    """A number, or whatever else is no node."""

    value: Any


# `Inside` and `Carried` are equal in all blocks of a chain; what `Outside` and `Literal` hold may differ.
Binding = Inside | Carried | Outside | Literal


class Broken(Exception):
    """Block `block` does not continue the chain; the message says why."""

    def __init__(self, block: int, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.block, self.reason, self.node = block, reason, node


class NotCarried(Broken):
    """The blocks do not feed each other."""


class OpSequence:
    """The ops of a graph in order, and what is known of them.

    Args:
        constants_first: whether what hangs on nothing but sizes stands in front of all others.
    """

    def __init__(self, graph: fx.Graph, attributes: Mapping[str, Any], constants_first: bool = True) -> None:
        self.attributes = attributes
        self.ops = [node for node in graph.nodes if node.op.startswith("call_")]
        if constants_first:
            # The zeros that only the first step of a recurrence makes would set it apart from the others.
            self.ops.sort(key=lambda node: not self._is_constant(node))
        self.position = {node: index for index, node in enumerate(self.ops)}
        memory = written_memory(graph)
        # By node: the ops that write to its memory, and the first of them.
        self.writers = {alias: writers for aliases, writers in memory for alias in aliases}
        self.written = {alias: writers[0] for alias, writers in self.writers.items()}
        # What may be written to without autograd's knowledge: its backward then reads what was written.
        self.unwatched = {alias for aliases, _ in memory if any(map(_is_data, aliases)) for alias in aliases}
        self.kinds = Kinds(self.value)
        # Ops that were found to take another number in each block where only a number may stand.
        self.varying: dict[fx.Node, None] = {}
        self._leaves: dict[fx.Node, list[Any]] = {}

    def value(self, node: fx.Node) -> Any:
        """The value of a node, as far as it is known."""
        return self.attributes.get(str(node.target)) if node.op == "get_attr" else node.meta.get("example_value")

    def writer_behind(self, node: fx.Node) -> fx.Node | None:
        """The first op that may write to what `node` has computed."""
        position = self.position[node]
        return next((writer for writer in self.writers.get(node, ()) if self.position[writer] > position), None)

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether an op hangs on nothing but sizes of arguments; or takes an argument out of what it came in."""
        if self._is_size(node) or is_argument(node):
            return True
        made_anew = isinstance(self.value(node), torch.Tensor) and not is_random(node)
        return made_anew and all(map(self._is_size, node.all_input_nodes))

    def _is_size(self, node: fx.Node) -> bool:
        """Whether it is a size of an argument or attribute, taken anew at each call."""
        is_taken = node.op == "call_method" and node.target == "size" and type(self.value(node)) is int
        return is_taken and is_argument(node.all_input_nodes[0])

    def leaves(self, node: fx.Node) -> list[Any]:
        """All leaves of an op's arguments."""
        leaves = self._leaves.get(node)
        if leaves is None:
            leaves = self._leaves[node] = flatten_arguments(node)
        return leaves


def _is_data(node: fx.Node) -> bool:
    """Whether it is the `data` of a tensor."""
    return op_name(node) == "get_data_attr" or (node.target is getattr and node.args[1:] == ("data",))


@dataclass(frozen=True, eq=False)
class Blocks:
    """`count` candidate blocks of `period` ops, from op `start` on."""

    sequence: OpSequence
    start: int
    period: int
    count: int

    def op(self, block: int, index: int) -> fx.Node:
        return self.sequence.ops[self.start + block * self.period + index]

    def column(self, index: int, length: int) -> list[fx.Node]:
        """Op `index` of each of the first `length` blocks: a column of ops."""
        first = self.start + index
        return self.sequence.ops[first : first + length * self.period : self.period]

    def ops(self, first: int, stop: int) -> list[fx.Node]:
        return self.sequence.ops[self.start + first * self.period : self.start + stop * self.period]

    def modules(self, first: int, stop: int) -> str:
        """Where blocks `first` to `stop - 1` stand in the model."""
        return module_range([self.ops(block, block + 1) for block in (first, stop - 1)])

    def source(self) -> str:
        """The line of the first block that says most: that of its last op which has one."""
        return next(filter(None, map(describe_source, reversed(self.ops(0, 1)))), "")

    def bind(self, block: int, leaf: Any) -> Binding:
        """What an argument of an op of `block` is."""
        if not isinstance(leaf, fx.Node):
            return Literal(leaf)
        position = self.sequence.position.get(leaf)
        if position is None or position < self.start:
            return Outside(leaf)
        producer, index = divmod(position - self.start, self.period)
        if producer == block:
            return Inside(index)
        return Carried(block - producer, index) if producer < block else Outside(leaf)


def say_difference(node: fx.Node, expected: Binding, binding: Binding, leaf: Any) -> str:
    """How an argument is wired otherwise than in the other blocks."""
    name = op_name(node)
    got = f"{leaf.name}" if isinstance(leaf, fx.Node) else repr(leaf)
    if type(expected) is type(binding):
        return f"{name} is wired to another op ({got}) than in the other blocks"
    return f"{name} takes {_WORDS[type(binding)]} ({got}) where the other blocks take {_WORDS[type(expected)]}"


_WORDS: dict[type, str] = {
    Inside: "an op of its own block",
    Carried: "a state of the block before",
    Outside: "a value from outside the blocks",
    Literal: "a number or other literal",
}


def names_of(nodes: Sequence[fx.Node]) -> str:
    return ", ".join(node.name for node in nodes)
