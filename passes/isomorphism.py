"""Whether blocks are isomorphic: which of the first ones are wired alike, and which ops make up their body."""

from __future__ import annotations

import numbers
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from pcr_fx.graphs.effects import hides_ops, is_random, updates_statistics, writes
from pcr_fx.graphs.nodes import lookup, op_name
from pcr_fx.graphs.parts import OwnDerivative
from pcr_fx.passes.bindings import (
    Binding,
    Blocks,
    Broken,
    Carried,
    Inside,
    Literal,
    NotCarried,
    Outside,
    names_of,
    say_difference,
)
from pcr_fx.passes.describe import describe_node

# Ops for which a number that differs from block to block may become a tensor that does.
SCALAR_OPS = frozenset(
    """add div fmod mod mul multiply pow radd remainder rmod rmul rsub rtruediv sub subtract true_divide truediv""".split()
)
# Those that choose: a tensor beside the number, with dimensions, gives the dtype.
CHOICES = frozenset("eq ge gt le lt ne where".split())


class Isomorphism:
    """The most of the first `length` blocks that are isomorphic.

    Attributes:
        length: how many they are.
        broken: why the block behind them is not, where that was found.
        template: the block that shows the wiring.
        bindings: for each op of a block what its arguments are.
        body: the ops that the carried values are computed from, in order.
        columns: for each argument `(op, slot)` what it is in each block, its column: nodes or literals. Of a carried value, only
            what the first blocks take in its place; of a value of the block itself, nothing.

    Raises:
        Broken: the first two blocks are not isomorphic, or no chain.
    """

    def __init__(self, blocks: Blocks, length: int) -> None:
        self.blocks, self.length = blocks, length
        self.broken: Broken | None = None
        # The third block shows the wiring: the first takes from outside what the others are handed, and so does the
        # second where a state of two blocks back is used.
        self.template = min(2, length - 1)
        self.bindings: list[list[Binding]] = [
            [blocks.bind(self.template, leaf) for leaf in self._leaves(self.template, index)]
            for index in range(blocks.period)
        ]
        body = self._body_ops()
        # First of all, since it mostly concerns every block.
        self._check_effects(sorted(self._dependent(body)))
        self.columns = {
            (index, slot): self._column(index, slot)
            for index in sorted(body)
            for slot in range(len(self.bindings[index]))
        }
        self.body = sorted(body - self._hoisted(body))

    def column(self, index: int, slot: int) -> list[Any]:
        """One argument over all blocks of the chain."""
        return self.columns[index, slot][: self.length]

    def _stop(self, broken: Broken) -> None:
        """The chain ends before the broken block."""
        if broken.block < 2:
            raise broken
        if broken.block < self.length:
            self.length, self.broken = broken.block, broken

    def _leaves(self, block: int, index: int) -> list[Any]:
        return self.blocks.sequence.leaves(self.blocks.op(block, index))

    # --- which ops -------------------------------------------------------------------------------------------------

    def _body_ops(self) -> set[int]:
        """The ops that the carried values are computed from; a head that only reads a state stays outside."""
        carried = {binding.index for row in self.bindings for binding in row if isinstance(binding, Carried)}
        if not carried:
            raise NotCarried(1, "no value is carried from block to block")
        body = self._ancestors(self._recurrent(carried))
        return body - self._counters(body)

    def _counters(self, body: set[int]) -> set[int]:
        """Ops that hand on whole numbers or truth values which no real number decides: they stay outside, as operands.

        Whole numbers among the states would be rounded where they are large.
        """
        carried = {b.index for index in body for b in self.bindings[index] if isinstance(b, Carried)}
        reached = {index for index in carried if not self._is_whole(self.blocks.op(self.template, index))}
        if not reached or reached == carried:
            return set()
        pending = True
        while pending:
            pending = False
            for index in body - reached:
                if any(isinstance(b, (Inside, Carried)) and b.index in reached for b in self.bindings[index]):
                    reached.add(index)
                    pending = True
        return self._ancestors(carried - reached)

    def _recurrent(self, carried: set[int]) -> set[int]:
        """The carried values that the carried values themselves depend on; others only pass by."""
        while True:
            body = self._ancestors(carried)
            used = {binding.index for index in body for binding in self.bindings[index] if isinstance(binding, Carried)}
            if used == carried:
                return carried
            if not used:
                raise NotCarried(1, "no value is carried from block to block")
            carried = used & carried

    def _ancestors(self, targets: set[int]) -> set[int]:
        seen, pending = set[int](), list(targets)
        while pending:
            index = pending.pop()
            if index not in seen:
                seen.add(index)
                pending.extend(b.index for b in self.bindings[index] if isinstance(b, Inside))
        return seen

    def _dependent(self, body: set[int]) -> set[int]:
        """The ops of the body that the state reaches."""
        dependent: set[int] = set()
        for index in sorted(body):
            for binding in self.bindings[index]:
                is_state = isinstance(binding, Carried) and binding.index in body
                if is_state or (isinstance(binding, Inside) and binding.index in dependent):
                    dependent.add(index)
        return dependent

    # --- what they do beside computing --------------------------------------------------------------------------------

    def _check_effects(self, body: list[int]) -> None:
        for block in range(self.length):
            for index in body:
                reason = self._effect(self.blocks.op(block, index))
                if reason:
                    self._stop(Broken(block, reason, self.blocks.op(block, index)))
                    return

    def _effect(self, node: fx.Node) -> str:
        if is_random(node):
            return f"random op {op_name(node)}: each evaluation would draw other numbers"
        if hides_ops(node):
            return f"{op_name(node)} holds ops that are not looked into"
        if op_name(node) == "autograd_grad":
            return "a gradient is taken of what other ops computed; torch.func.grad takes it of a function"
        if updates_statistics(node):
            advice = "in evaluation, or with track_running_stats=False, it has none to update"
            return f"mutation: {op_name(node)} in training mode updates its statistics; {advice}"
        if writes(node):
            return f"mutation: {op_name(node)} writes to {names_of(writes(node))}"
        writer = self.blocks.sequence.writer_behind(node)
        return f"mutation: {describe_node(writer)} writes to a value of the block" if writer is not None else ""

    # --- how they are wired -----------------------------------------------------------------------------------------

    def _column(self, index: int, slot: int) -> list[Any]:
        """One argument over all blocks; the chain ends before the first block that is wired otherwise."""
        expected, blocks = self.bindings[index][slot], self.blocks
        values = [blocks.sequence.leaves(node)[slot] for node in blocks.column(index, self.length)]
        if isinstance(expected, (Inside, Carried)):
            lag = expected.lag if isinstance(expected, Carried) else 0
            produced = blocks.column(expected.index, len(values))
            odd = next((b for b in range(lag, len(values)) if values[b] is not produced[b - lag]), None)
            early = values[:lag]
            if odd is None and not early:
                return early
            if odd is not None:
                self._stop(self._miswired(odd, index, slot, values[odd]))
            for block, value in enumerate(early):
                if not isinstance(blocks.bind(block, value), Outside):
                    self._stop(self._miswired(block, index, slot, value))
            return early
        position, start = blocks.sequence.position, blocks.start
        wants_node = isinstance(expected, Outside)
        for block, value in enumerate(values):
            is_node = isinstance(value, fx.Node)
            if is_node is not wants_node or (is_node and position.get(value, -1) >= start):
                if isinstance(blocks.bind(block, value), type(expected)):
                    continue
                self._stop(self._miswired(block, index, slot, value))
                break
        return values

    def _miswired(self, block: int, index: int, slot: int, value: Any) -> Broken:
        node, expected = self.blocks.op(block, index), self.bindings[index][slot]
        return Broken(block, say_difference(node, expected, self.blocks.bind(block, value), value), node)

    # --- what reads the body ------------------------------------------------------------------------------------------

    def may_be_head(self, index: int, read: Collection[int]) -> bool:
        """Whether an op reads any of the ops `read` or a state, and does no more than compute a known result."""
        reads = any(isinstance(b, (Inside, Carried)) and b.index in read for b in self.bindings[index])
        column = self.blocks.column(index, self.length)
        known = self.blocks.sequence.value(column[0]) is not None
        return reads and known and not any(self._stays(node) or self._effect(node) for node in column)

    def regular(self, index: int, slot: int) -> list[Any]:
        """One argument of any op over all blocks, as it is.

        Raises:
            Broken: it is wired otherwise in one of them.
        """
        expected, blocks = self.bindings[index][slot], self.blocks
        values = [blocks.sequence.leaves(node)[slot] for node in blocks.column(index, self.length)]
        for block, value in enumerate(values):
            binding = blocks.bind(block, value)
            if isinstance(expected, Carried) and block < expected.lag:
                is_alike = isinstance(binding, Outside)
            elif isinstance(expected, (Inside, Carried)):
                is_alike = binding == expected
            else:
                is_alike = isinstance(binding, type(expected))
            if not is_alike:
                raise self._miswired(block, index, slot, value)
        return values

    # --- what cannot be evaluated for all blocks at once ------------------------------------------------------------

    def _hoisted(self, body: set[int]) -> set[int]:
        """Ops that do not see the state and cannot be evaluated for all blocks at once: they stay outside."""
        dependent = self._dependent(body)
        hoisted: set[int] = set()
        for index in sorted(body):
            for slot in range(len(self.bindings[index])):
                broken = self._varying_literal(index, slot)
                if broken is not None and index in dependent:
                    self._stop(broken)
                elif broken is not None:
                    hoisted.add(index)
            if index in dependent:
                continue
            if self._looks_up(index) or any(map(self._stays, self.blocks.column(index, self.length))):
                hoisted.add(index)
        return self._ancestors(hoisted)

    def _stays(self, node: fx.Node) -> bool:
        """Whether an op is to be evaluated where it stands."""
        return (
            is_random(node) or bool(writes(node)) or node in self.blocks.sequence.written or not self._is_tensor(node)
        )

    def _looks_up(self, index: int) -> bool:
        """Whether an op takes from a table of all blocks what it looks up in it: all at once, before the blocks."""
        columns = [set(map(id, self.columns[index, slot])) for slot in range(len(self.bindings[index]))]
        nodes = [lookup(node) for node in self.blocks.column(index, self.length)]
        if any(found is None for found in nodes):
            return False
        slots = self.blocks.sequence.leaves(self.blocks.op(0, index))
        table = next(slot for slot, leaf in enumerate(slots) if leaf is nodes[0][0])  # type: ignore[index]
        return len(columns[table]) == 1 and isinstance(self.bindings[index][table], Outside)

    def _varying_literal(self, index: int, slot: int) -> Broken | None:
        if not isinstance(self.bindings[index][slot], Literal):
            return None
        return self.varying(index, slot, self.column(index, slot))

    def varying(self, index: int, slot: int, values: list[Any]) -> Broken | None:
        """The first block whose number in an argument is another one, where that may not be: where it is no operand."""
        block = next((b for b, value in enumerate(values) if not same_literal(value, values[0])), None)
        if block is None or self._is_scalar_operand(index, slot, values):
            return None
        node = self.blocks.op(block, index)
        self.blocks.sequence.varying[node] = None
        words = f"{op_name(node)} has the argument {values[block]!r} where the blocks before have {values[0]!r}"
        return Broken(block, words, node)

    def _is_scalar_operand(self, index: int, slot: int, values: list[Any]) -> bool:
        node = self.blocks.op(0, index)
        numeric = all(isinstance(value, float) for value in values)
        if isinstance(node.target, OwnDerivative):
            return numeric  # made to take them
        is_choice = op_name(node).strip("_") in CHOICES
        beside = [source for source in node.all_input_nodes if self._is_floating(source)]
        if is_choice and not any(self.blocks.sequence.value(source).dim() for source in beside):
            return False
        if not numeric and (is_choice or self._is_floating(node)):
            # A whole number stays one beside a tensor of whole numbers.
            numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        # Slot by slot, positional arguments come first; `alpha=` is a keyword and must stay a number.
        takes_numbers = is_choice or (op_name(node).strip("_") in SCALAR_OPS and len(node.args) <= 2)
        return numeric and takes_numbers and slot < len(node.args)

    def _is_tensor(self, node: fx.Node) -> bool:
        value = self.blocks.sequence.value(node)
        return value is None or isinstance(value, (torch.Tensor, tuple, list))

    def _is_whole(self, node: fx.Node) -> bool:
        value = self.blocks.sequence.value(node)
        return isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex())

    def _is_floating(self, node: fx.Node) -> bool:
        value = self.blocks.sequence.value(node)
        return isinstance(value, torch.Tensor) and value.is_floating_point()


def same_literal(left: Any, right: Any) -> bool:
    """Equality that tells 1 from 1.0 and True, and takes nan for itself."""
    if type(left) is not type(right):
        return False
    if isinstance(left, numbers.Number) and left != left:
        return bool(right != right)
    return bool(left == right)
