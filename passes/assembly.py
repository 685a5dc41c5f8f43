"""Make the record of a chain from blocks that are isomorphic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import fx

from pcr_fx.chain import Chain, Origin
from pcr_fx.graphs.nodes import op_name
from pcr_fx.passes.bindings import Binding, Broken, Carried, Inside, Literal, NotCarried
from pcr_fx.passes.describe import describe_node
from pcr_fx.passes.isomorphism import Isomorphism, same_literal
from pcr_fx.passes.kinds import say_spec


@dataclass(frozen=True, eq=False)
class FoundChain:
    """A chain and where its ends are tied into the graph.

    Attributes:
        chain: the record that the solver takes.
        initial: the node of each initial state.
        operands: for each per-block operand its L nodes.
        shared: the nodes of the shared operands.
        states: for each state its L nodes, one a block; all that the rest of the graph may read.
        nodes: every node that the solve node replaces.
    """

    chain: Chain
    initial: tuple[fx.Node, ...]
    operands: tuple[tuple[fx.Node, ...], ...]
    shared: tuple[fx.Node, ...]
    states: tuple[tuple[fx.Node, ...], ...]
    nodes: frozenset[fx.Node]

    @property
    def taps(self) -> list[tuple[int, int]]:
        """The states that the rest of the graph reads: (which of the states, after which block)."""
        return [
            (index, block)
            for index, states in enumerate(self.states)
            for block, state in enumerate(states)
            if any(user not in self.nodes for user in state.users)
        ]


@dataclass(frozen=True)
class _Input:
    """An argument of the body."""

    name: str


def assemble_chain(blocks: Isomorphism) -> FoundChain:
    """The chain that isomorphic blocks make.

    Raises:
        Broken: block `block` cannot belong to it: its state has another shape, or an inner value of it is read outside.
    """
    return _Assembly(blocks).chain()


class _Assembly:
    def __init__(self, isomorphism: Isomorphism) -> None:
        self.isomorphism, self.blocks, self.length = isomorphism, isomorphism.blocks, isomorphism.length
        self.sequence, self.body = self.blocks.sequence, isomorphism.body
        self.inner = set(self.body)
        # A carried value read `lag` blocks later is handed on through `lag` states.
        self.components = self._components()
        self.initial: dict[tuple[int, int], fx.Node] = {}
        self.operands: dict[tuple[fx.Node, ...], str] = {}
        self.literals: dict[tuple[float, ...], str] = {}
        self.shared: dict[fx.Node, str] = {}

    def chain(self) -> FoundChain:
        self._bind_initial()
        self._check_users()
        body = self._body_graph()
        self._check_unwritten()
        counts = len(self.components), len(self.operands), len(self.shared)
        chain = Chain(body, self.length, *counts, tuple(self.literals), self._origin())
        states = [tuple(self.blocks.column(index, self.length)) for index, lag in self.components if lag == 1]
        nodes = frozenset(node for index in self.body for node in self.blocks.column(index, self.length))
        initial = tuple(self.initial[component] for component in self.components)
        return FoundChain(chain, initial, tuple(self.operands), tuple(self.shared), tuple(states), nodes)

    def _origin(self) -> Origin:
        ops = tuple(op_name(self.blocks.op(0, index)) for index in self.body)
        return Origin(self.blocks.modules(0, self.length), self.blocks.source(), ops)

    # --- states -----------------------------------------------------------------------------------------------------

    def _components(self) -> list[tuple[int, int]]:
        lags: dict[int, int] = {}
        for index in self.body:
            for binding in self.isomorphism.bindings[index]:
                if self._is_state(binding):
                    lags[binding.index] = max(lags.get(binding.index, 0), binding.lag)
        deepest = max(lags.values(), default=0)
        if not deepest:
            raise NotCarried(1, "no value is carried from block to block")
        if deepest > 1 and self.length <= deepest:
            raise Broken(self.length, "too few blocks for values that skip a block")
        # By lag: those that blocks return come first, then those that are only handed on.
        return [(index, lag) for lag in range(1, deepest + 1) for index in sorted(lags) if lag <= lags[index]]

    def _is_state(self, binding: Binding) -> TypeGuard[Carried]:
        """Whether an argument is carried by the chain; a value of the block before may also stand outside it."""
        return isinstance(binding, Carried) and binding.index in self.inner

    def _bind_initial(self) -> None:
        """What the first blocks take from outside where later ones are handed a carried value."""
        for index in self.body:
            for slot, expected in enumerate(self.isomorphism.bindings[index]):
                if not self._is_state(expected):
                    continue
                for block, value in enumerate(self.isomorphism.column(index, slot)):
                    self._bind(block, (expected.index, expected.lag - block), value, self.blocks.op(block, index))
        for component in self.components:
            if component not in self.initial:
                raise Broken(1, "the first block does not start from a state of its own")
            self._check_state(component)

    def _bind(self, block: int, component: tuple[int, int], value: fx.Node, op: fx.Node) -> None:
        known = self.initial.setdefault(component, value)
        if known is not value:
            words = f"{op_name(op)} starts from {value.name}, another op of the block from {known.name}"
            raise Broken(block + 1, words, op)

    def _check_state(self, component: tuple[int, int]) -> None:
        """A state is a floating tensor of the same shape before and after each block."""
        nodes = self.initial[component], self.blocks.op(0, component[0])
        for value in map(self.sequence.value, nodes):
            if value is not None and not (isinstance(value, torch.Tensor) and value.is_floating_point()):
                got = say_spec(self.sequence.kinds.spec(nodes[0]))
                raise Broken(1, f"the value carried from block to block is no floating tensor but {got}")
        before, after = map(self.sequence.kinds.spec, nodes)
        if before is not None and after is not None and before[0] != after[0]:
            words = f"the first block changes the shape of its state from {say_spec(before)} to {say_spec(after)}"
            raise Broken(0, words)

    def _check_users(self) -> None:
        """Inner values may be used by their own block only; carried values by anyone."""
        carried = {index for index, _ in self.components}
        body, period, start = self.inner, self.blocks.period, self.blocks.start
        for index in self.body:
            if index in carried:
                continue
            for block, node in enumerate(self.blocks.column(index, self.length)):
                first = start + block * period
                for user in node.users:
                    if self.sequence.position.get(user, -1) - first not in body:
                        words = f"{describe_node(user)} reads {op_name(node)} of the block"
                        raise Broken(block, f"inner value used outside: {words}", user)

    def _check_unwritten(self) -> None:
        groups = [tuple(self.initial.values()), tuple(self.shared), *self.operands]
        for number, nodes in enumerate(groups):
            for position, node in enumerate(nodes):
                writer = self.sequence.written.get(node)
                if writer is not None:
                    words = f"mutation: {describe_node(writer)} writes to {node.name}, which the blocks read"
                    raise Broken(position if number > 1 else 0, words, writer)

    # --- the body ---------------------------------------------------------------------------------------------------

    def _body_graph(self) -> fx.GraphModule:
        """One block as a graph of its own: states, operands, literals and shared operands in, states out."""
        arguments = {index: self._arguments(index) for index in self.body}
        graph = fx.Graph()
        inputs: dict[str, fx.Node] = {}
        for position, component in enumerate(self.components):
            inputs[_state(*component)] = graph.placeholder(f"state_{position}")
        for names in (self.operands, self.literals, self.shared):
            for name in names.values():  # type: ignore[attr-defined]
                inputs[name] = graph.placeholder(name)
        copies: dict[int, fx.Node] = {}
        for index in self.body:
            node, leaves = self.blocks.op(self.isomorphism.template, index), iter(arguments[index])

            def replace(_: Any, leaves: Any = leaves) -> Any:
                leaf = next(leaves)
                if isinstance(leaf, Inside):
                    return copies[leaf.index]
                return inputs[leaf.name] if isinstance(leaf, _Input) else leaf

            args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), replace)  # type: ignore[misc]
            copies[index] = graph.create_node(node.op, node.target, args, kwargs)
        graph.output(
            tuple(copies[index] if lag == 1 else inputs[_state(index, lag - 1)] for index, lag in self.components)
        )
        return fx.GraphModule({}, graph)

    def _arguments(self, index: int) -> list[Any]:
        """The arguments of one op of the body: inner ops, inputs of the body, or constants."""
        row: list[Any] = []
        for slot, expected in enumerate(self.isomorphism.bindings[index]):
            if self._is_state(expected):
                row.append(_Input(_state(expected.index, expected.lag)))
            elif isinstance(expected, Literal):
                row.append(self._literal(self.isomorphism.column(index, slot)))
            elif isinstance(expected, Inside) and expected.index in self.inner:
                row.append(expected)
            else:
                row.append(self._operand(index, slot, self._values(index, slot, expected)))
        return row

    def _values(self, index: int, slot: int, expected: Binding) -> tuple[fx.Node, ...]:
        """What stands outside the body and each block takes."""
        values = self.isomorphism.column(index, slot)
        if isinstance(expected, (Inside, Carried)):
            values = [*values, *self.blocks.column(expected.index, self.length - len(values))]
        return tuple(values)

    def _literal(self, values: list[Any]) -> Any:
        if all(same_literal(value, values[0]) for value in values):
            return values[0]
        return _Input(self.literals.setdefault(tuple(values), f"literal_{len(self.literals)}"))

    def _operand(self, index: int, slot: int, nodes: tuple[fx.Node, ...]) -> Any:
        values = list(map(self.sequence.value, nodes))
        # Numbers that the compiler leaves open. Taking the value makes the compiler guard it: another compiles anew.
        if all(_is_known(value, torch.SymInt) for value in values):
            return self._size(index, values)
        if all(_is_known(value, torch.SymFloat) for value in values):
            numbers = [float(value) for value in values]
            broken = self.isomorphism.varying(index, slot, numbers)
            if broken is not None:
                raise broken
            return self._literal(numbers)
        if all(node is nodes[0] for node in nodes):
            self._check_shared(nodes[0], index)
            return _Input(self.shared.setdefault(nodes[0], f"shared_{len(self.shared)}"))
        self._check_stackable(nodes, index)
        return _Input(self.operands.setdefault(nodes, f"operand_{len(self.operands)}"))

    def _size(self, index: int, sizes: Sequence[Any]) -> int:
        """A size that the compiler leaves open: as above, but one for all blocks."""
        for block, size in enumerate(sizes):
            if int(size) != int(sizes[0]):
                op = self.blocks.op(block, index)
                raise Broken(block, f"{op_name(op)} takes the size {size}, the blocks before {sizes[0]}", op)
        return int(sizes[0])

    def _check_shared(self, node: fx.Node, index: int) -> None:
        value = self.sequence.value(node)
        if value is not None and not isinstance(value, torch.Tensor):
            depends = isinstance(value, (torch.SymInt, torch.SymFloat))
            got = "a number that depends on data" if depends else say_spec(self.sequence.kinds.spec(node))
            op = self.blocks.op(0, index)
            raise Broken(0, f"{op_name(op)} takes {node.name}, which is no tensor but {got}", op)

    def _check_stackable(self, nodes: Sequence[fx.Node], index: int) -> None:
        """Operands that differ from block to block are stacked: they must have one shape and dtype."""
        shapes = list(map(self.sequence.kinds.spec, nodes))
        for block, shape in enumerate(shapes):
            if isinstance(shape, tuple) and shape == shapes[0]:
                continue
            op, name = self.blocks.op(block, index), nodes[block].name
            if shape is None:
                words = f"the shape of {name}, an operand of {op_name(op)}, is not known without example inputs"
            elif not isinstance(shape, tuple):
                words = f"{op_name(op)} takes {name}, which is no tensor but {say_spec(shape)}"
            else:
                usual = say_spec(shapes[0])
                words = f"{op_name(op)} takes an operand of {say_spec(shape)} where the blocks before take {usual}"
            raise Broken(block, words, op)


def _is_known(value: Any, kind: type[torch.SymInt] | type[torch.SymFloat]) -> bool:
    """Whether a number that the compiler leaves open has a value before data are computed."""
    return isinstance(value, kind) and value.node.hint is not None


def _state(index: int, lag: int) -> str:
    return f"state{index}, {lag}"
