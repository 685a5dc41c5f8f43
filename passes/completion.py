"""Complete the last block of a chain where parts of it are missing since nobody reads them.

A loop that gives away its spikes, and not the potential behind the last of them, computes less in its last step: what was
unread is gone from the graph. Its last block would stand alone behind the chain, op by op, and what the chain gives away
would have to be copied to be joined with it.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from pcr_fx.graphs.nodes import argument, is_pytorchs, op_name
from pcr_fx.passes.bindings import Blocks, Carried, Inside
from pcr_fx.passes.isomorphism import same_literal
from pcr_fx.passes.kinds import flatten_arguments

# A gradient of zero stays zero behind these, whatever they are given.
_LINEAR = frozenset(
    """add cat chunk clone concat contiguous detach double expand flatten float getitem iadd isub narrow neg permute pos reshape
    rsub select split squeeze stack sub subtract to transpose type_as unbind unsqueeze view where""".split()
)
# These multiply it by what they are given: by numbers that the model itself computes with, if nothing else.
_BOUNDED = frozenset(
    """abs addmm bmm clamp clamp_max clamp_min cos eq ge gt imul le linear lt matmul maximum minimum mm mul multiply ne relu
    sigmoid sin tanh""".split()
)
_SCALED = frozenset("div imul itruediv mul multiply true_divide truediv".split())
# Under what name a tensor knows which entries the model takes of it that nobody reads: `(dimension, index)`.
_ENTRIES = "unread entries"
# In place of an argument that is another one in each block.
_VARIES = object()
# Less than this share of a block may be alike by accident, if nobody reads it together with the block before.
_SHARE = 1 / 3


def complete_last_block(blocks: Blocks, length: int, guarded: bool) -> bool:
    """Put into the graph what is missing of the block behind the first `length`, if that is a block but for what is unread.

    What is put in has no readers, so that no value changes. It takes its operands where the blocks before have them.

    Args:
        guarded: whether the graph is only called with tensors of the sizes that it was captured with, where those are numbers.

    Returns:
        whether anything was missing, and is there now.
    """
    if length < 2:
        return False
    last = _LastBlock(blocks, length, guarded)
    missing = [index for index in range(blocks.period) if index not in last.ops]
    if not missing or not last.is_a_block() or not (last.is_read_alike() and last.keeps_zero(missing)):
        return False
    for index in missing:
        last.insert(index)
    return True


class _LastBlock:
    """What there is of the block behind the first `length`.

    Attributes:
        ops: its ops, by their places in a block.
        renamed: what it takes from outside in place of what the block before takes.
    """

    def __init__(self, blocks: Blocks, length: int, guarded: bool) -> None:
        self.blocks, self.length, self.guarded = blocks, length, guarded
        self.ops: dict[int, fx.Node] = {}
        self.renamed: dict[fx.Node, fx.Node] = {}
        stop, index = blocks.start + length * blocks.period, 0
        for node in blocks.sequence.ops[stop : stop + blocks.period]:
            places = (place for place in range(index, blocks.period) if self._matches(place, node))
            if (place := next(places, None)) is None:
                break
            self._add(place, node)
            index = place + 1

    def _usual(self, index: int) -> fx.Node:
        return self.blocks.op(self.length - 1, index)

    def _leaves(self, node: fx.Node) -> list[Any]:
        return self.blocks.sequence.leaves(node)

    def _matches(self, index: int, node: fx.Node) -> bool:
        """Whether an op stands here as one of a block would."""
        usual, kinds = self._usual(index), self.blocks.sequence.kinds
        if kinds.of(usual) != kinds.of(node):
            return False
        pairs = zip(self._leaves(node), self._leaves(usual), strict=True)
        return all(
            isinstance(leaf, fx.Node) == isinstance(known, fx.Node)
            if (expected := self._expected(index, slot)) is _VARIES
            else _same(leaf, expected)
            for slot, (leaf, known) in enumerate(pairs)
        )

    def _expected(self, index: int, slot: int) -> Any:
        """What an op takes if it is wired as the blocks before; `_VARIES` where these differ."""
        blocks, length = self.blocks, self.length
        last, before = (self._leaves(blocks.op(block, index))[slot] for block in (length - 1, length - 2))
        binding = blocks.bind(length - 1, last)
        if isinstance(binding, Inside):
            return self.ops.get(binding.index)
        if isinstance(binding, Carried):
            return blocks.op(length - binding.lag, binding.index)
        return last if _same(last, before) else _VARIES

    def _add(self, index: int, node: fx.Node) -> None:
        self.ops[index] = node
        for slot, (usual, leaf) in enumerate(zip(self._leaves(self._usual(index)), self._leaves(node), strict=True)):
            if isinstance(usual, fx.Node) and self._expected(index, slot) is _VARIES:
                self.renamed[usual] = leaf

    def is_a_block(self) -> bool:
        """Whether it is one by no accident: by how much of it there is, or since it is collected as the block before is."""
        if len(self.ops) >= _SHARE * self.blocks.period:
            return True
        within = {*self.ops.values(), *self.blocks.ops(0, self.length)}
        return any(
            not within.issuperset(node.users.keys() & self._usual(index).users) for index, node in self.ops.items()
        )

    def is_read_alike(self) -> bool:
        """Whether what is read of it outside of the blocks is read of the block before, too, or as its own blocks read it:
        it is no other block then.
        """
        within, kinds = {*self.ops.values(), *self.blocks.ops(0, self.length)}, self.blocks.sequence.kinds

        def is_alike(node: fx.Node, usual: fx.Node) -> bool:
            outside = node.users.keys() - within
            known = {kinds.of(user) for user in usual.users}
            return not within.issuperset(usual.users) or all(kinds.of(user) in known for user in outside)

        return all(is_alike(node, self._usual(index)) for index, node in self.ops.items())

    def keeps_zero(self, missing: list[int]) -> bool:
        """Whether the gradient of what nobody reads is zero, as it is in the model.

        It is zero at the end of the block; `0 * inf` on the way back would make it none. What the model itself does not
        read in its last block, an operand that only its state depends on, may be anything.
        """
        unread: set[int] = set()
        for index in missing:
            node = self._usual(index)
            name, is_unread = op_name(node), self._is_unread(index, unread)
            is_scaled = name in _SCALED and sum(isinstance(leaf, fx.Node) for leaf in node.args) == 1
            is_known = node.op == "call_method" or is_pytorchs(node.target)
            if not is_known or not (name in _LINEAR or is_scaled or (name in _BOUNDED and not is_unread)):
                return False
            if is_unread:
                unread.add(index)
        return True

    def _is_unread(self, index: int, unread: set[int]) -> bool:
        for slot, leaf in enumerate(self._leaves(self._usual(index))):
            binding = self.blocks.bind(self.length - 1, leaf)
            if isinstance(binding, Inside) and binding.index in unread:
                return True
            if self._expected(index, slot) is _VARIES and leaf not in self.renamed:
                return True
        return False

    def insert(self, index: int) -> None:
        """Put one op into the graph, with the arguments that it would have. Those before it are there."""
        usual, before = self._usual(index), self.blocks.op(self.length - 2, index)
        following, slots = _next_entry(usual, before, self.guarded), itertools.count()

        def replace(leaf: Any) -> Any:
            slot = next(slots)
            expected = self._expected(index, slot)
            if expected is not _VARIES:
                return expected
            if isinstance(leaf, fx.Node):
                return self._following(leaf, self._leaves(before)[slot])
            return following if type(leaf) is int and following is not None else leaf

        anchor = self.ops[index - 1] if index else self._usual(self.blocks.period - 1)
        self.ops[index] = _copied(usual, anchor, replace)

    def _following(self, last: fx.Node, before: fx.Node) -> fx.Node:
        """What comes behind two operands of blocks: the next entry of one tensor if they are that, or the last once more."""
        if last not in self.renamed:
            index, slots = _next_entry(last, before, self.guarded), iter(flatten_arguments(before))
            if index is None:
                return last
            self.renamed[last] = _copied(last, last, lambda leaf: leaf if _same(leaf, next(slots)) else index)
        return self.renamed[last]


def _copied(usual: fx.Node, anchor: fx.Node, replace: Callable[[Any], Any]) -> fx.Node:
    """The same op behind `anchor`, its arguments replaced leaf by leaf."""
    args, kwargs = fx.node.map_aggregate((usual.args, usual.kwargs), replace)  # type: ignore[misc]
    with usual.graph.inserting_after(anchor):
        node = usual.graph.create_node(usual.op, usual.target, args, kwargs)
    node.meta = dict(usual.meta)
    return node


def _same(one: Any, other: Any) -> bool:
    return one is other if isinstance(one, fx.Node) or isinstance(other, fx.Node) else same_literal(one, other)


def _next_entry(last: fx.Node, before: fx.Node, guarded: bool) -> int | None:
    """The entry behind those that two ops take of a tensor, as `xs[t]`; `None` where they do not, or there may be none.

    The tensors of another call may have fewer, unless the model takes it itself, or sizes are guarded.
    """
    here, there = _entry(last), _entry(before)
    pairs = list(zip(flatten_arguments(last), flatten_arguments(before), strict=False))
    if here is None or there is None or sum(not _same(*pair) for pair in pairs) != 1:
        return None
    (dim, index), (_, previous) = here, there
    value = last.args[0].meta.get("example_value") if isinstance(last.args[0], fx.Node) else None
    if isinstance(value, (tuple, list)):
        size = len(value)
    elif isinstance(value, torch.Tensor) and dim < value.dim():
        size = value.shape[dim]
    else:
        return None
    following = 2 * index - previous
    if type(size) is not int or not 0 <= following < size:
        return None
    stays = guarded or isinstance(value, (tuple, list)) or _is_taken(last.args[0], dim, following)
    return following if stays else None


def note_entry(node: fx.Node) -> None:
    """Have a tensor know that the model takes the entry of it that an op takes, though nobody reads that."""
    entry = _entry(node)
    if entry is not None and isinstance(node.args[0], fx.Node):
        node.args[0].meta.setdefault(_ENTRIES, set()).add(entry)


def _is_taken(source: Any, dim: int, index: int) -> bool:
    return (dim, index) in source.meta.get(_ENTRIES, ())


def _entry(node: fx.Node) -> tuple[int, int] | None:
    """The dimension and the index by which an op takes one entry, where it is as simple as that."""
    if op_name(node) == "select":
        dim, index = argument(node, 1, "dim"), argument(node, 2, "index")
    elif node.target is operator.getitem:
        entries = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        dim, index = len(entries) - 1, entries[-1]
        if any(entry != slice(None) for entry in entries[:-1]):
            return None
    else:
        return None
    return (dim, index) if type(dim) is int and type(index) is int and dim >= 0 else None
