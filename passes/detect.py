"""Find chains: runs of isomorphic blocks, each fed by the one before.

The sequence of ops proposes runs (`periods.py`); this file decides. Within a run every argument of every op is bound to
what it is in terms of its block: an op of the same block, a value carried from an earlier block, something outside, or a
literal. Blocks with equal bindings are isomorphic. The first that differs ends the chain, and what differs is the reason
in the report.
"""

from __future__ import annotations

import itertools
import numbers
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from pcr_fx.chain import Chain, Origin
from pcr_fx.passes.describe import describe_node, describe_source, module_range
from pcr_fx.passes.effects import hides_ops, is_random, op_name, updates_statistics, writes, written_nodes
from pcr_fx.passes.periods import Run, find_runs

# Ops for which a number that differs from block to block may become a tensor that does.
_SCALAR_OPS = frozenset(
    [
        "add",
        "sub",
        "mul",
        "truediv",
        "div",
        "pow",
        "multiply",
        "subtract",
        "true_divide",
        "radd",
        "rsub",
        "rmul",
        "rtruediv",
    ]
)


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


@dataclass(frozen=True)
class Rejected:
    """A near miss: blocks that look like a chain, and why they are none."""

    modules: str
    reason: str
    length: int = 0
    source: str = ""


@dataclass
class Detection:
    """What `find_chains` found."""

    chains: list[FoundChain] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


def find_chains(graph: fx.Graph, attributes: dict[str, Any], min_length: int) -> Detection:
    """Every chain of at least `min_length` blocks, and the near misses.

    Args:
        graph: a normalised graph.
        attributes: the value of each `get_attr` target.
        min_length: the fewest blocks worth a chain.
    """
    return _Detector(graph, attributes, min_length).run()


# How an argument is bound within its block. `Inside` and `Carried` are the wiring, equal in all blocks of a chain;
# `Outside` and `Literal` are what may differ.
@dataclass(frozen=True)
class _Inside:
    index: int


@dataclass(frozen=True)
class _Carried:
    lag: int
    index: int


@dataclass(frozen=True)
class _Outside:
    node: fx.Node


@dataclass(frozen=True)
class _Literal:
    value: Any


_Binding = _Inside | _Carried | _Outside | _Literal


class _Broken(Exception):
    """Block `block` does not continue the chain; the message says why."""

    def __init__(self, block: int, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.block, self.reason, self.node = block, reason, node


class _NotCarried(_Broken):
    """The blocks do not feed each other."""


# A cut through an op that returns several tensors would carry the tuple: any other cut is better.
_TUPLE_COST = 1000


def flatten_arguments(node: fx.Node) -> list[Any]:
    """All leaves of an op's arguments, in a fixed order."""
    leaves: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda leaf: leaves.append(leaf))
    return leaves


class _Detector:
    def __init__(self, graph: fx.Graph, attributes: dict[str, Any], min_length: int) -> None:
        self.graph, self.attributes, self.min_length = graph, attributes, min_length
        self.ops = [node for node in graph.nodes if node.op.startswith("call_")]
        self.position = {node: index for index, node in enumerate(self.ops)}
        self.written = written_nodes(graph)
        self.claimed: set[int] = set()
        self.found = Detection()
        # Near misses by where they start: a longer period may yet make a chain of the same ops.
        self.misses: dict[tuple[int, int], Rejected] = {}

    def run(self) -> Detection:
        looks = [self._look(node) for node in self.ops]
        for run in find_runs(looks, max(2, min(self.min_length, 3))):
            for start, stop in self._unclaimed(run):
                self._search(Run(start, stop, run.period))
        self.found.chains.sort(key=lambda found: self.position[found.states[0][0]])
        for before, after in itertools.pairwise(self.found.chains):
            self._note_between(before, after)
        for (start, stop), miss in sorted(self.misses.items(), key=lambda item: item[0]):
            taken = sum(1 for index in range(start, stop) if index in self.claimed)
            if 2 * taken < stop - start:
                self.found.rejected.append(miss)
        return self.found

    # --- proposing -------------------------------------------------------------------------------------------------

    def _look(self, node: fx.Node) -> tuple[Any, ...]:
        """What an op looks like before its wiring: blocks of one chain look alike op by op."""
        arguments = self._kind(node.args), self._kind(node.kwargs)
        return node.op, node.target, arguments, _shape(node.meta.get("example_value"))

    def _kind(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            if argument.op == "get_attr":
                return _shape(self.attributes.get(str(argument.target)))
            return _shape(argument.meta.get("example_value")) or "op"
        # How the leaves are nested matters: x[0, 1] is not x[[0, 1]].
        if isinstance(argument, (tuple, list)):
            return isinstance(argument, tuple), *map(self._kind, argument)
        if isinstance(argument, dict):
            return tuple((name, self._kind(value)) for name, value in argument.items())
        if isinstance(argument, slice):
            return slice, *map(self._kind, (argument.start, argument.stop, argument.step))
        # 1 and 0.5 may both be factors of one chain.
        return float if type(argument) is int else type(argument)

    def _unclaimed(self, run: Run) -> list[tuple[int, int]]:
        stretches, start = [], None
        for index in range(run.start, run.stop + 1):
            free = index < run.stop and index not in self.claimed
            if free and start is None:
                start = index
            elif not free and start is not None:
                if index - start >= 2 * run.period:
                    stretches.append((start, index))
                start = None
        return stretches

    def _search(self, run: Run) -> None:
        """Chains within one run. What ends a chain is passed, and the search goes on behind it."""
        start = run.start + self._best_phase(run)
        count = (run.stop - start) // run.period
        first = 0
        while count - first >= 2:
            first += self._take(_Blocks(self, start + first * run.period, run.period, count - first))

    def _best_phase(self, run: Run) -> int:
        """Where within the period to cut: where the fewest values are carried over, then for the most blocks."""
        live = [0] * (run.stop - run.start + 1)
        for index in range(run.start, run.stop):
            users = [self.position.get(user, run.stop) for user in self.ops[index].users]
            last = min(max(users, default=index), run.stop - 1)
            weight = _TUPLE_COST if _is_tuple(self.ops[index]) else 1
            live[index - run.start + 1] += weight
            live[last - run.start + 1] -= weight
        for index in range(1, len(live)):
            live[index] += live[index - 1]
        # In the middle of the run the ends do not show.
        whole = (run.stop - run.start) // run.period
        middle = whole // 2 * run.period
        remainder = (run.stop - run.start) - whole * run.period

        def cost(phase: int) -> tuple[int, bool, int]:
            return live[min(middle + phase, len(live) - 1)], phase > remainder, phase

        return min(range(run.period), key=cost)

    # --- deciding --------------------------------------------------------------------------------------------------

    def _take(self, blocks: _Blocks) -> int:
        """Claim the chain that starts with the first of `blocks`; the number of blocks that are dealt with."""
        # A few blocks first: what rules out the first blocks mostly rules out all, and each is tried in turn.
        length, broken = self._longest(blocks, min(blocks.count, max(self.min_length, 2)))
        if length >= self.min_length and length < blocks.count and broken is None:
            length, broken = self._longest(blocks, blocks.count)
        if length < self.min_length:
            self._miss(blocks, length, broken)
            return max(length, 1)
        found = blocks.chain(length)
        self.found.chains.append(found)
        self.claimed.update(self.position[node] for node in found.nodes)
        if broken is not None:
            self._note(blocks, length, broken)
        return length

    def _longest(self, blocks: _Blocks, length: int) -> tuple[int, _Broken | None]:
        """How many of the first `length` blocks make a chain, and what is wrong with the one after."""
        broken: _Broken | None = None
        while True:
            try:
                blocks.chain(length)
                return length, broken
            except _Broken as ended:
                broken = ended
                if ended.block < 2 or ended.block >= length:
                    return min(ended.block, 1), broken
                length = ended.block

    def _miss(self, blocks: _Blocks, length: int, broken: _Broken | None) -> None:
        """Remember why no chain starts here: once for a run, and only for what has the makings of a chain."""
        start, stop = blocks.start, blocks.start + blocks.period * blocks.count
        if any(first <= start < last for first, last in self.misses):
            return
        if length >= 2 or broken is None:
            reason = f"too short: {max(length, 2)} blocks, min_length={self.min_length}"
            if broken is not None:
                reason += f"; the next block differs: {broken.reason}"
        elif blocks.count < self.min_length or isinstance(broken, _NotCarried):
            # A few alike ops that do not feed each other are no near miss of anything.
            return
        else:
            reason = broken.reason
        modules = blocks.modules(0, length if length >= 2 else blocks.count)
        self.misses[start, stop] = Rejected(modules, reason, blocks.count, blocks.source())

    def _note(self, blocks: _Blocks, length: int, broken: _Broken) -> None:
        """The block that ended a chain before its run ended."""
        self.found.rejected.append(
            Rejected(
                blocks.modules(length, length + 1),
                f"ends the chain {blocks.modules(0, length)}: {broken.reason}",
                1,
                describe_source(broken.node) if broken.node is not None else "",
            )
        )

    def _note_between(self, before: FoundChain, after: FoundChain) -> None:
        """The odd block that stands between two chains of one kind."""
        kind = before.chain.origin.ops
        last, first = (sorted(self.position[node] for node in chain.nodes) for chain in (before, after))
        odd = self.ops[last[-1] + 1 : first[0]]
        if after.chain.origin.ops != kind or not 0 < len(odd) <= 2 * len(kind):
            return
        names = tuple(map(op_name, odd))
        modules = module_range([odd])
        if any(miss.modules == modules for miss in self.found.rejected):
            return
        what = f"its ops are {' > '.join(names)}" if names != kind else "its shapes, dtypes or arguments differ"
        chains = f"{before.chain.origin.modules} and {after.chain.origin.modules}"
        reason = f"stands between the chains {chains}: {what}"
        self.found.rejected.append(Rejected(modules, reason, 1, describe_source(odd[-1])))


class _Blocks:
    """`count` candidate blocks of `period` ops, from op `start` on."""

    def __init__(self, detector: _Detector, start: int, period: int, count: int) -> None:
        self.detector, self.start, self.period, self.count = detector, start, period, count

    def op(self, block: int, index: int) -> fx.Node:
        return self.detector.ops[self.start + block * self.period + index]

    def ops(self, first: int, stop: int) -> list[fx.Node]:
        return self.detector.ops[self.start + first * self.period : self.start + stop * self.period]

    def modules(self, first: int, stop: int) -> str:
        return module_range([self.ops(block, block + 1) for block in range(first, min(stop, self.count))])

    def source(self) -> str:
        return describe_source(self.op(0, self.period - 1))

    def chain(self, length: int) -> FoundChain:
        """The chain of the first `length` blocks, or `_Broken` at the first block that cannot belong to it."""
        return _Assembly(self, length).chain()

    def bind(self, block: int, leaf: Any) -> _Binding:
        if not isinstance(leaf, fx.Node):
            return _Literal(leaf)
        position = self.detector.position.get(leaf)
        if position is None or position < self.start:
            return _Outside(leaf)
        producer, index = divmod(position - self.start, self.period)
        if producer == block:
            return _Inside(index)
        return _Carried(block - producer, index) if producer < block else _Outside(leaf)


class _Assembly:
    """One attempt to make a chain of the first `length` blocks."""

    def __init__(self, blocks: _Blocks, length: int) -> None:
        self.blocks, self.length = blocks, length
        self.detector = blocks.detector
        # The third block shows the wiring: the first takes from outside what the others are handed, and so does the
        # second where a state of two blocks back is used.
        self.template = min(2, length - 1)
        self.bindings = [
            [blocks.bind(self.template, leaf) for leaf in flatten_arguments(blocks.op(self.template, index))]
            for index in range(blocks.period)
        ]

    def chain(self) -> FoundChain:
        body = self._body_ops()
        # First of all, since it mostly concerns every block.
        self._check_effects(self._dependent(body))
        columns = {
            (index, slot): self._column(index, slot)
            for index in sorted(body)
            for slot in range(len(self.bindings[index]))
        }
        hoisted = self._hoisted(body, columns)
        return _Builder(self, body - hoisted, columns).build()

    def _body_ops(self) -> set[int]:
        """The ops that the carried values are computed from; a head that only reads a state stays outside."""
        carried = {binding.index for row in self.bindings for binding in row if isinstance(binding, _Carried)}
        if not carried:
            raise _NotCarried(1, "no value is carried from block to block")
        return self._ancestors(self._recurrent(carried))

    def _recurrent(self, carried: set[int]) -> set[int]:
        """The carried values that the carried values themselves depend on; others only pass by."""
        while True:
            body = self._ancestors(carried)
            used = {
                binding.index for index in body for binding in self.bindings[index] if isinstance(binding, _Carried)
            }
            if used == carried:
                return carried
            if not used:
                raise _NotCarried(1, "no value is carried from block to block")
            carried = used & carried

    def _ancestors(self, targets: set[int]) -> set[int]:
        seen, pending = set(), list(targets)
        while pending:
            index = pending.pop()
            if index not in seen:
                seen.add(index)
                pending.extend(b.index for b in self.bindings[index] if isinstance(b, _Inside))
        return seen

    def _column(self, index: int, slot: int) -> list[_Binding]:
        """One argument over all blocks, checked to be wired alike."""
        expected = self.bindings[index][slot]
        column: list[_Binding] = []
        for block in range(self.length):
            node = self.blocks.op(block, index)
            leaves = self._leaves(block, index)
            binding = self.blocks.bind(block, leaves[slot])
            early = isinstance(expected, _Carried) and block < expected.lag and isinstance(binding, _Outside)
            if not early and not _alike(expected, binding):
                raise _Broken(block, _difference(node, expected, binding, leaves[slot]), node)
            column.append(binding)
        return column

    def _leaves(self, block: int, index: int) -> list[Any]:
        node = self.blocks.op(block, index)
        cache = self.detector.__dict__.setdefault("leaves", {})
        if node not in cache:
            cache[node] = flatten_arguments(node)
        return cache[node]

    def _dependent(self, body: set[int]) -> set[int]:
        """The ops of the body that the state reaches."""
        dependent: set[int] = set()
        for index in sorted(body):
            for binding in self.bindings[index]:
                if isinstance(binding, _Carried) or (isinstance(binding, _Inside) and binding.index in dependent):
                    dependent.add(index)
        return dependent

    def _hoisted(self, body: set[int], columns: dict[tuple[int, int], list[_Binding]]) -> set[int]:
        """Ops that do not see the state and cannot be evaluated for all blocks at once: they stay outside."""
        dependent = self._dependent(body)
        hoisted: set[int] = set()
        for index in sorted(body):
            node = self.blocks.op(0, index)
            for slot in range(len(self.bindings[index])):
                broken = self._varying_literal(index, slot, columns[index, slot])
                if broken is not None:
                    if index in dependent:
                        raise broken
                    hoisted.add(index)
            if index not in dependent and (is_random(node) or writes(node) or not _is_tensor(node)):
                hoisted.add(index)
        return self._ancestors(hoisted)

    def _varying_literal(self, index: int, slot: int, column: list[_Binding]) -> _Broken | None:
        if not isinstance(column[0], _Literal):
            return None
        values = [binding.value for binding in column if isinstance(binding, _Literal)]
        block = next((b for b, value in enumerate(values) if not _same_literal(value, values[0])), None)
        if block is None or self._is_scalar_operand(index, slot, values):
            return None
        node = self.blocks.op(block, index)
        return _Broken(
            block,
            f"{op_name(node)} has the argument {values[block]!r} where the blocks before have {values[0]!r}",
            node,
        )

    def _is_scalar_operand(self, index: int, slot: int, values: list[Any]) -> bool:
        node = self.blocks.op(0, index)
        numeric = all(isinstance(value, float) for value in values)
        if not numeric and _is_floating(node):
            # A whole number stays one beside a tensor of whole numbers.
            numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        # Slot by slot, positional arguments come first; `alpha=` is a keyword and must stay a number.
        return numeric and op_name(node).strip("_") in _SCALAR_OPS and slot < len(node.args) <= 2

    def _check_effects(self, body: set[int]) -> None:
        for block in range(self.length):
            for index in sorted(body):
                node = self.blocks.op(block, index)
                if is_random(node):
                    raise _Broken(block, f"random op {op_name(node)}: each evaluation would draw other numbers", node)
                if hides_ops(node):
                    raise _Broken(block, f"{op_name(node)} holds ops that are not looked into", node)
                if updates_statistics(node):
                    raise _Broken(block, f"mutation: {op_name(node)} in training mode updates its statistics", node)
                if writes(node):
                    raise _Broken(block, f"mutation: {op_name(node)} writes to {_names(writes(node))}", node)
        for block in range(self.length):
            for index in sorted(body):
                node = self.blocks.op(block, index)
                if node in self.detector.written:
                    writer = self.detector.written[node]
                    raise _Broken(block, f"mutation: {describe_node(writer)} writes to a value of the block", writer)


class _Builder:
    """Makes the records of a chain whose blocks are known to be isomorphic."""

    def __init__(self, assembly: _Assembly, body: set[int], columns: dict[tuple[int, int], list[_Binding]]) -> None:
        self.assembly, self.blocks, self.length = assembly, assembly.blocks, assembly.length
        self.detector = assembly.detector
        self.body, self.columns = sorted(body), columns
        # A carried value read `lag` blocks later is handed on through `lag` states.
        self.components = self._components()
        self.initial: dict[tuple[int, int], fx.Node] = {}
        self.operands: dict[tuple[fx.Node, ...], str] = {}
        self.literals: dict[tuple[float, ...], str] = {}
        self.shared: dict[fx.Node, str] = {}

    def build(self) -> FoundChain:
        self._bind_initial()
        self._check_users()
        body = self._body_graph()
        states = tuple(
            tuple(self.blocks.op(block, index) for block in range(self.length))
            for index, lag in self.components
            if lag == 1
        )
        nodes = frozenset(self.blocks.op(block, index) for block in range(self.length) for index in self.body)
        chain = Chain(
            body,
            self.length,
            len(self.components),
            len(self.operands),
            len(self.shared),
            tuple(self.literals),
            self._origin(),
        )
        outside = (*self.initial.values(), *self.shared, *(n for column in self.operands for n in column))
        for node in outside:
            if node in self.detector.written:
                writer = self.detector.written[node]
                raise _Broken(
                    0, f"mutation: {describe_node(writer)} writes to {node.name}, which the blocks read", writer
                )
        return FoundChain(
            chain,
            tuple(self.initial[component] for component in self.components),
            tuple(self.operands),
            tuple(self.shared),
            states,
            nodes,
        )

    def _components(self) -> list[tuple[int, int]]:
        lags: dict[int, int] = {}
        for index in self.body:
            for binding in self.assembly.bindings[index]:
                if isinstance(binding, _Carried):
                    lags[binding.index] = max(lags.get(binding.index, 0), binding.lag)
        deepest = max(lags.values(), default=0)
        if deepest > 1 and self.length <= deepest:
            raise _Broken(self.length, "too few blocks for values that skip a block")
        return [(index, lag) for index in sorted(lags) for lag in range(1, lags[index] + 1)]

    def _bind_initial(self) -> None:
        """What the first blocks take from outside where later ones are handed a carried value."""
        for (index, slot), column in self.columns.items():
            expected = self.assembly.bindings[index][slot]
            if index not in self.body or not isinstance(expected, _Carried):
                continue
            for block, binding in enumerate(column[: expected.lag]):
                assert isinstance(binding, _Outside)
                component = (expected.index, expected.lag - block)
                known = self.initial.setdefault(component, binding.node)
                if known is not binding.node:
                    node = self.blocks.op(block, index)
                    raise _Broken(
                        block + 1,
                        f"{op_name(node)} starts from {binding.node.name}, another op of the block from {known.name}",
                        node,
                    )
        for component in self.components:
            if component not in self.initial:
                raise _Broken(1, "the first block does not start from a state of its own")
            self._check_state(component)

    def _check_state(self, component: tuple[int, int]) -> None:
        """A state is a floating tensor of the same shape before and after each block."""
        before = self._value(self.initial[component])
        after = self._value(self.blocks.op(0, component[0]))
        for value in (before, after):
            if value is not None and not (isinstance(value, torch.Tensor) and value.is_floating_point()):
                raise _Broken(
                    1, f"the value carried from block to block is no floating tensor but {_say(_shape(value))}"
                )
        if before is not None and after is not None and _shape(before)[0] != _shape(after)[0]:
            raise _Broken(
                0,
                f"the first block changes the shape of its state from {_say(_shape(before))} to {_say(_shape(after))}",
            )

    def _check_users(self) -> None:
        """Inner values may be used by their own block only; carried values by anyone."""
        carried = {index for index, _ in self.components}
        body = set(self.body)
        for index in self.body:
            if index in carried:
                continue
            for block in range(self.length):
                node = self.blocks.op(block, index)
                for user in node.users:
                    place = self.detector.position.get(user, -1) - self.blocks.start
                    inside = place >= 0 and divmod(place, self.blocks.period) in ((block, i) for i in body)
                    if not inside:
                        raise _Broken(
                            block,
                            f"inner value used outside: {describe_node(user)} reads {op_name(node)} of the block",
                            user,
                        )

    def _origin(self) -> Origin:
        return Origin(
            self.blocks.modules(0, self.length),
            self.blocks.source(),
            tuple(op_name(self.blocks.op(0, index)) for index in self.body),
        )

    def _body_graph(self) -> fx.GraphModule:
        """One block as a graph of its own: states, operands, literals and shared operands in, states out."""
        arguments = {index: self._classify(index) for index in self.body}
        graph = fx.Graph()
        inputs: dict[str, fx.Node] = {}
        for position, component in enumerate(self.components):
            inputs[f"state{component}"] = graph.placeholder(f"state_{position}")
        for names in (self.operands, self.literals, self.shared):
            for name in names.values():  # type: ignore[attr-defined]
                inputs[name] = graph.placeholder(name)
        copies: dict[int, fx.Node] = {}
        for index in self.body:
            node = self.blocks.op(self.assembly.template, index)
            leaves = iter(arguments[index])

            def replace(_: Any, leaves: Any = leaves) -> Any:
                leaf = next(leaves)
                if isinstance(leaf, _Inside):
                    return copies[leaf.index]
                return inputs[leaf.value] if isinstance(leaf, _Input) else leaf

            args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), replace)  # type: ignore[misc]
            copies[index] = graph.create_node(node.op, node.target, args, kwargs)
        outputs = tuple(
            copies[index] if lag == 1 else inputs[f"state{(index, lag - 1)}"] for index, lag in self.components
        )
        graph.output(outputs)
        return fx.GraphModule({}, graph)

    def _classify(self, index: int) -> list[Any]:
        """The arguments of one op of the body: inner ops, inputs of the body, or constants."""
        row: list[Any] = []
        for slot, expected in enumerate(self.assembly.bindings[index]):
            column = self.columns[index, slot]
            if isinstance(expected, _Carried):
                row.append(_Input(f"state{(expected.index, expected.lag)}"))
            elif isinstance(expected, _Inside) and expected.index in set(self.body):
                row.append(expected)
            elif isinstance(expected, _Literal):
                row.append(self._literal([b.value for b in column if isinstance(b, _Literal)]))
            else:
                row.append(_Input(self._operand(index, slot, column)))
        return row

    def _literal(self, values: list[Any]) -> Any:
        if all(_same_literal(value, values[0]) for value in values):
            return values[0]
        return _Input(self.literals.setdefault(tuple(values), f"literal_{len(self.literals)}"))

    def _operand(self, index: int, slot: int, column: list[_Binding]) -> str:
        nodes = tuple(
            binding.node if isinstance(binding, _Outside) else self.blocks.op(block, binding.index)  # type: ignore[union-attr]
            for block, binding in enumerate(column)
        )
        if all(node is nodes[0] for node in nodes):
            self._check_shared(nodes[0], index)
            return self.shared.setdefault(nodes[0], f"shared_{len(self.shared)}")
        self._check_stackable(nodes, index)
        return self.operands.setdefault(nodes, f"operand_{len(self.operands)}")

    def _check_shared(self, node: fx.Node, index: int) -> None:
        value = self._value(node)
        if value is not None and not isinstance(value, torch.Tensor):
            op = self.blocks.op(0, index)
            raise _Broken(0, f"{op_name(op)} takes {node.name}, which is no tensor but {_say(_shape(value))}", op)

    def _check_stackable(self, nodes: Sequence[fx.Node], index: int) -> None:
        """Operands that differ from block to block are stacked: they must have one shape and dtype."""
        looks = [_shape(self._value(node)) for node in nodes]
        for block, look in enumerate(looks):
            op = self.blocks.op(block, index)
            if look is None:
                raise _Broken(
                    block,
                    f"the shape of {nodes[block].name}, an operand of {op_name(op)}, is not known without example inputs",
                    op,
                )
            if not isinstance(look, tuple):
                raise _Broken(
                    block, f"{op_name(op)} takes {nodes[block].name}, which is no tensor but {_say(look)}", op
                )
            if look != looks[0]:
                raise _Broken(
                    block,
                    f"{op_name(op)} takes an operand of {_say(look)} where the blocks before take {_say(looks[0])}",
                    op,
                )

    def _value(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self.detector.attributes.get(str(node.target))
        return node.meta.get("example_value")


@dataclass(frozen=True)
class _Input:
    value: str


def _alike(expected: _Binding, binding: _Binding) -> bool:
    if isinstance(expected, (_Inside, _Carried)):
        return expected == binding
    return type(expected) is type(binding)


def _difference(node: fx.Node, expected: _Binding, binding: _Binding, leaf: Any) -> str:
    name = op_name(node)
    words = {
        _Inside: "an op of its own block",
        _Carried: "a state of the block before",
        _Outside: "a value from outside the blocks",
        _Literal: "a number or other literal",
    }
    got = f"{leaf.name}" if isinstance(leaf, fx.Node) else repr(leaf)
    if type(expected) is type(binding):
        return f"{name} is wired to another op ({got}) than in the other blocks"
    return f"{name} takes {words[type(binding)]} ({got}) where the other blocks take {words[type(expected)]}"


def _same_literal(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, numbers.Number) and left != left:
        return right != right
    return bool(left == right)


def _shape(value: Any) -> Any:
    """Shape, dtype and device of a tensor, the type of anything else, `None` when nothing is known."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return tuple(map(str, value.shape)), value.dtype, value.device
    # Each graph module has a class of its own.
    return fx.GraphModule if isinstance(value, fx.GraphModule) else type(value)


def _say(look: Any) -> str:
    if isinstance(look, tuple):
        return f"shape [{', '.join(look[0])}] and {look[1]}"
    return getattr(look, "__name__", str(look))


def _names(nodes: Sequence[fx.Node]) -> str:
    return ", ".join(node.name for node in nodes)


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return value is None or isinstance(value, (torch.Tensor, tuple, list))


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_tuple(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    if value is not None:
        return not isinstance(value, torch.Tensor)
    return bool(node.users) and all(
        user.target is operator.getitem and isinstance(user.args[1], int) and op_name(node) not in ("getitem",)
        for user in node.users
    )
