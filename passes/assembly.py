"""Make the record of a chain from blocks that are isomorphic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import fx

from pcr_fx.body.reals import carry_reals
from pcr_fx.chain import Chain, Complex, Head, Leaving, Origin
from pcr_fx.graphs.nodes import op_name
from pcr_fx.passes.bindings import Binding, Broken, Carried, Inside, Literal, NotCarried
from pcr_fx.passes.describe import describe_node
from pcr_fx.passes.isomorphism import Isomorphism, same_literal
from pcr_fx.passes.kinds import say_spec
from pcr_fx.passes.states import check_state, whole_dtype


@dataclass(frozen=True, eq=False)
class FoundChain:
    """A chain and where its ends are tied into the graph.

    Attributes:
        chain: the record that the solver takes.
        initial: the node of each initial state.
        operands, shared: for each per-block operand its L nodes; the nodes of the shared operands.
        head_operands, head_shared: those of the head.
        values: L nodes, one a block, for each state and, counted behind them, each output; all that the rest of the graph
            may read.
        nodes: every node that the solve node replaces.
        wholes: the dtype of each state of truth values or whole numbers.
    """

    chain: Chain
    initial: tuple[fx.Node, ...]
    operands: tuple[tuple[fx.Node, ...], ...]
    shared: tuple[fx.Node, ...]
    head_operands: tuple[tuple[fx.Node, ...], ...]
    head_shared: tuple[fx.Node, ...]
    values: Mapping[int, tuple[fx.Node, ...]]
    nodes: frozenset[fx.Node]
    wholes: tuple[torch.dtype | None, ...] = ()

    @property
    def leaving(self) -> Leaving:
        """What the rest of the graph reads, each value by itself."""
        taps = [
            (index, block)
            for index, values in self.values.items()
            for block, value in enumerate(values)
            if any(user not in self.nodes for user in value.users)
        ]
        return Leaving(tuple(taps))


@dataclass(frozen=True)
class _Input:
    """An argument of the body."""

    name: str


def assemble_chain(blocks: Isomorphism) -> FoundChain:
    """The chain that isomorphic blocks make.

    Raises:
        Broken: block `block` cannot belong to it: its state has another shape, say.
    """
    return _Assembly(blocks).chain()


@dataclass
class _Inputs:
    """The inputs of a body beside the states, by what they stand for: their names."""

    prefix: str = ""
    operands: dict[tuple[fx.Node, ...], str] = field(default_factory=dict)
    literals: dict[tuple[float, ...], str] = field(default_factory=dict)
    shared: dict[fx.Node, str] = field(default_factory=dict)

    def operand(self, nodes: tuple[fx.Node, ...]) -> _Input:
        return _Input(self.operands.setdefault(nodes, f"{self.prefix}operand_{len(self.operands)}"))

    def literal(self, values: tuple[float, ...]) -> _Input:
        return _Input(self.literals.setdefault(values, f"{self.prefix}literal_{len(self.literals)}"))

    def common(self, node: fx.Node) -> _Input:
        return _Input(self.shared.setdefault(node, f"{self.prefix}shared_{len(self.shared)}"))

    @property
    def names(self) -> list[str]:
        return [*self.operands.values(), *self.literals.values(), *self.shared.values()]

    def known_to(self, others: _Inputs) -> dict[Any, _Input]:
        """Those that are among others too, with what they are there."""
        pairs: list[tuple[Mapping[Any, str], Mapping[Any, str]]] = [
            (self.operands, others.operands),
            (self.literals, others.literals),
            (self.shared, others.shared),
        ]
        return {
            _Input(name): _Input(theirs[what])
            for ours, theirs in pairs
            for what, name in ours.items()
            if what in theirs
        }


class _Assembly:
    def __init__(self, isomorphism: Isomorphism) -> None:
        self.isomorphism, self.blocks, self.length = isomorphism, isomorphism.blocks, isomorphism.length
        self.sequence, self.body = self.blocks.sequence, isomorphism.body
        self.inner = set(self.body)
        # A carried value read `lag` blocks later is handed on through `lag` states.
        self.components = self._components()
        self.initial: dict[tuple[int, int], fx.Node] = {}
        self.inputs, self.head_inputs = _Inputs(), _Inputs("head_")

    def chain(self) -> FoundChain:
        self._bind_initial()
        body = self._body_graph()
        heads = self._heads()
        outputs = self._outputs(heads)
        head = self._head(heads, outputs) if outputs else None
        self._check_unwritten()
        counts = len(self.components), len(self.inputs.operands), len(self.inputs.shared)
        which = self._complex(outputs)
        is_checkpoint = any("recompute" in self.blocks.op(0, index).meta for index in self.body)
        chain = Chain(body, self.length, *counts, tuple(self.inputs.literals), self._origin(), head, is_checkpoint)
        chain = carry_reals(chain, which) if which else chain
        numbered = [(number, index) for number, (index, lag) in enumerate(self.components) if lag == 1]
        numbered += enumerate(outputs, len(self.components))
        values = {number: tuple(self.blocks.column(index, self.length)) for number, index in numbered}
        nodes = frozenset(node for index in [*self.body, *heads] for node in self.blocks.column(index, self.length))
        return FoundChain(
            chain,
            tuple(self.initial[component] for component in self.components),
            tuple(self.inputs.operands),
            tuple(self.inputs.shared),
            tuple(self.head_inputs.operands),
            tuple(self.head_inputs.shared),
            values,
            nodes,
            tuple(map(self._whole_dtype, self.components)),
        )

    def _complex(self, outputs: Sequence[int]) -> Complex:
        """Which of the chain's tensors are complex."""

        def are(nodes: Iterable[fx.Node]) -> tuple[bool, ...]:
            return tuple(_is_complex(self.sequence.value(node)) for node in nodes)

        ours, heads = self.inputs, self.head_inputs
        return Complex(
            are(self.initial[component] for component in self.components),
            are(operand[0] for operand in ours.operands),
            are(ours.shared),
            are(operand[0] for operand in heads.operands),
            are(heads.shared),
            are(self.blocks.op(0, index) for index in outputs),
        )

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
        values = map(self.sequence.value, self.initial.values())
        with_reals = any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in values)
        for component in self.components:
            check_state(self.sequence, *self._ends(component), with_reals)

    def _bind(self, block: int, component: tuple[int, int], value: fx.Node, op: fx.Node) -> None:
        known = self.initial.setdefault(component, value)
        if known is not value:
            words = f"{op_name(op)} starts from {value.name}, another op of the block from {known.name}"
            raise Broken(block + 1, words, op)

    def _ends(self, component: tuple[int, int]) -> tuple[fx.Node, fx.Node]:
        """A state before and after the first block."""
        return self.initial[component], self.blocks.op(0, component[0])

    def _whole_dtype(self, component: tuple[int, int]) -> torch.dtype | None:
        return whole_dtype(map(self.sequence.value, self._ends(component)))

    # --- outputs ----------------------------------------------------------------------------------------------------

    def _heads(self) -> dict[int, list[Any]]:
        """The ops of a block that only read what its body computes, with their arguments.

        They too can be evaluated for all blocks at once, where no block behind has to wait for them.
        """
        heads: dict[int, list[Any]] = {}
        behind = self._reached()
        for index in sorted(set(range(self.blocks.period)) - self.inner):
            if self.isomorphism.may_be_head(index, self.inner | heads.keys()):
                try:
                    heads[index] = self._head_arguments(index, heads, behind, _Inputs())
                except Broken:
                    continue
        return heads

    def _reached(self) -> set[fx.Node]:
        """All that is computed from what the chain computes."""
        pending = [node for index in self.body for node in self.blocks.column(index, self.length)]
        reached: set[fx.Node] = set()
        while pending:
            node = pending.pop()
            if node not in reached:
                reached.add(node)
                pending.extend(node.users)
        return reached

    def _head_arguments(self, index: int, heads: Mapping[int, Any], behind: set[fx.Node], inputs: _Inputs) -> list[Any]:
        """The arguments of an op that reads what a block computes.

        Raises:
            Broken: it is wired otherwise in some block, or waits for another one.
        """
        row: list[Any] = []
        for slot, expected in enumerate(self.isomorphism.bindings[index]):
            column = self.isomorphism.regular(index, slot)
            if isinstance(expected, Literal):
                if (varying := self.isomorphism.varying(index, slot, column)) is not None:
                    raise varying
                row.append(self._literal(column, inputs))
            elif isinstance(expected, Inside) and (expected.index in self.inner or expected.index in heads):
                row.append(expected)
            elif self._is_state(expected):
                for block, value in enumerate(column[: expected.lag]):
                    if self.initial.get((expected.index, expected.lag - block)) is not value:
                        raise Broken(block, "it starts from another value than the chain")
                row.append(_Input(_state(expected.index, expected.lag)))
            elif any(node in behind for node in column):
                raise Broken(1, "it waits for other blocks")
            else:
                row.append(self._operand(index, slot, tuple(column), inputs))
        return row

    def _outputs(self, heads: Mapping[int, Any]) -> list[int]:
        """The ops whose results are read outside and are no states."""
        carried = {index for index, _ in self.components}
        columns = {index: self.blocks.column(index, self.length) for index in [*self.body, *heads]}
        inside = {node for column in columns.values() for node in column}
        outputs = []
        for index in sorted(columns.keys() - carried):
            reader = next((user for node in columns[index] for user in node.users if user not in inside), None)
            if reader is None:
                continue
            node = columns[index][0]
            if not isinstance(self.sequence.value(node), torch.Tensor):
                block = next(block for block, node in enumerate(columns[index]) if reader in node.users)
                words = f"{describe_node(reader)} reads {op_name(node)} of the block"
                raise Broken(block, f"inner value used outside: {words}", reader)
            outputs.append(index)
        return outputs

    def _head(self, heads: Mapping[int, Any], outputs: Sequence[int]) -> Head:
        """What computes the outputs."""
        carried = {index for index, lag in self.components if lag == 1}
        needed: set[int] = set()
        pending = list(outputs)
        while pending:
            index = pending.pop()
            if index not in needed:
                needed.add(index)
                row = heads[index] if index in heads else self._arguments(index, _Inputs())
                pending += [leaf.index for leaf in row if isinstance(leaf, Inside) and leaf.index not in carried]
        inputs, behind = self.head_inputs, set[fx.Node]()
        rows = {
            index: self._head_arguments(index, heads, behind, inputs)
            if index in heads
            else self._arguments(index, inputs)
            for index in sorted(needed)
        }
        states = [_state(*component) for component in self.components]
        new = [_new_state(index) if lag == 1 else _state(index, lag - 1) for index, lag in self.components]
        body = self._graph(rows, [*states, *(f"new {name}" for name in new), *inputs.names], outputs, carried)
        own = {index: self._arguments(index, self.inputs) for index in self.body}
        known = inputs.known_to(self.inputs)
        ahead = {
            index: [known.get(leaf, leaf) if isinstance(leaf, _Input) else leaf for leaf in row]
            for index, row in rows.items()
            if index in heads
        }
        every = [*states, *self.inputs.names, *inputs.names]
        block = self._graph(own | ahead, every, [*self._returned(), *outputs])
        counts = len(outputs), len(inputs.operands), len(inputs.shared)
        return Head(body, block, *counts, tuple(inputs.literals))

    def _check_unwritten(self) -> None:
        singles = (*self.initial.values(), *self.inputs.shared, *self.head_inputs.shared)
        for block, node in (
            *((0, node) for node in singles),
            *((block, node) for column in self.inputs.operands for block, node in enumerate(column)),
            *((block, node) for column in self.head_inputs.operands for block, node in enumerate(column)),
        ):
            # What is filled once before the blocks keeps its place, and of what is changed behind them a copy is kept.
            writer = next(
                (writer for writer in self.sequence.writers.get(node, ()) if self._breaks(writer, node)), None
            )
            if writer is not None:
                words = f"mutation: {describe_node(writer)} writes to {node.name}, which the blocks read"
                raise Broken(block, words, writer)

    def _breaks(self, writer: fx.Node, node: fx.Node) -> bool:
        """Whether a write to what the blocks read is among the blocks, or behind them where a backward would see it."""
        first, position = self.blocks.start, self.sequence.position[writer]
        is_behind = position >= first + self.length * self.blocks.period
        return position >= first and (not is_behind or node in self.sequence.unwatched)

    # --- the body ---------------------------------------------------------------------------------------------------

    def _body_graph(self) -> fx.GraphModule:
        """One block as a graph of its own: states, operands, literals and shared operands in, states out."""
        rows = {index: self._arguments(index, self.inputs) for index in self.body}
        states = [_state(*component) for component in self.components]
        return self._graph(rows, [*states, *self.inputs.names], self._returned())

    def _returned(self) -> list[int | str]:
        """What a block hands on: results of its ops, and states that it was given."""
        return [index if lag == 1 else _state(index, lag - 1) for index, lag in self.components]

    def _graph(
        self,
        rows: Mapping[int, list[Any]],
        inputs: Sequence[str],
        results: Sequence[int | str],
        given: Iterable[int] = (),
    ) -> fx.GraphModule:
        """Some ops of a block as a graph of their own.

        Args:
            rows: their arguments.
            inputs: what it takes.
            results: which results or inputs it returns.
            given: the ops whose results are inputs, as new states.
        """
        graph = fx.Graph()
        nodes: dict[Any, fx.Node] = {name: graph.placeholder(f"input_{n}") for n, name in enumerate(inputs)}
        nodes |= {index: nodes[f"new {_new_state(index)}"] for index in given}
        for index in sorted(rows):
            if index in nodes:
                continue
            node, leaves = self.blocks.op(self.isomorphism.template, index), iter(rows[index])

            def replace(_: Any, leaves: Any = leaves) -> Any:
                leaf = next(leaves)
                if isinstance(leaf, Inside):
                    return nodes[leaf.index]
                return nodes[leaf.name] if isinstance(leaf, _Input) else leaf

            args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), replace)  # type: ignore[misc]
            nodes[index] = graph.create_node(node.op, node.target, args, kwargs)
        graph.output(tuple(nodes[result] for result in results))
        return fx.GraphModule({}, graph)

    def _arguments(self, index: int, inputs: _Inputs) -> list[Any]:
        """The arguments of one op of the body: inner ops, inputs of the body, or constants."""
        row: list[Any] = []
        for slot, expected in enumerate(self.isomorphism.bindings[index]):
            if self._is_state(expected):
                row.append(_Input(_state(expected.index, expected.lag)))
            elif isinstance(expected, Literal):
                row.append(self._literal(self.isomorphism.column(index, slot), inputs))
            elif isinstance(expected, Inside) and expected.index in self.inner:
                row.append(expected)
            else:
                row.append(self._operand(index, slot, self._values(index, slot, expected), inputs))
        return row

    def _values(self, index: int, slot: int, expected: Binding) -> tuple[fx.Node, ...]:
        """What stands outside the body and each block takes."""
        values = self.isomorphism.column(index, slot)
        if isinstance(expected, (Inside, Carried)):
            values = [*values, *self.blocks.column(expected.index, self.length - len(values))]
        return tuple(values)

    def _literal(self, values: list[Any], inputs: _Inputs) -> Any:
        if all(same_literal(value, values[0]) for value in values):
            return values[0]
        return inputs.literal(tuple(values))

    def _operand(self, index: int, slot: int, nodes: tuple[fx.Node, ...], inputs: _Inputs) -> Any:
        values = list(map(self.sequence.value, nodes))
        # Numbers that the compiler leaves open. Taking the value makes the compiler guard it: another compiles anew.
        if all(_is_known(value, torch.SymInt) for value in values):
            return self._size(index, values)
        if all(_is_known(value, torch.SymFloat) for value in values):
            numbers = [float(value) for value in values]
            broken = self.isomorphism.varying(index, slot, numbers)
            if broken is not None:
                raise broken
            return self._literal(numbers, inputs)
        if all(node is nodes[0] for node in nodes):
            self._check_shared(nodes[0], index)
            return inputs.common(nodes[0])
        self._check_stackable(nodes, index)
        return inputs.operand(nodes)

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


def _is_complex(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_complex()


def _state(index: int, lag: int) -> str:
    return f"state{index}, {lag}"


def _new_state(index: int) -> str:
    return f"state{index}, 0"
