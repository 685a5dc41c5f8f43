"""Put a solve node where each planned chain stood."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import networkx as nx
import torch
from torch import fx

from pcr_fx.body.wholes import number_of_whole, whole_of_number
from pcr_fx.graphs.effects import hides_ops, is_barrier, is_random, written_memory
from pcr_fx.graphs.nodes import argument, is_pytorchs, lookup, op_name
from pcr_fx.operands import complex_of_parts, parts_of_complex, stack_operands, stack_parts
from pcr_fx.passes.describe import describe_node
from pcr_fx.passes.detect import FoundChain
from pcr_fx.passes.inline import copy_node

Stack = Callable[[fx.Graph, Sequence[fx.Node], dict[fx.Node, fx.Node]], fx.Node]


def sortable_chains(graph: fx.Graph, chains: Sequence[FoundChain]) -> list[FoundChain]:
    """The chains that can each be evaluated at one point of the graph's order, together."""
    if _order(graph, chains) is not None:
        return list(chains)
    kept: list[FoundChain] = []
    for chain in chains:
        if _order(graph, [*kept, chain]) is not None:
            kept.append(chain)
    return kept


def explain_unsortable(graph: fx.Graph, chain: FoundChain) -> str:
    """Why a chain cannot be evaluated at one point of the graph's order."""
    if _order(graph, [chain], ()) is None:
        return "a value computed from one of its states decides what a later block is given"
    if _order(graph, [chain]) is not None:
        return "it and another chain wait for each other"
    nodes = list(graph.nodes)
    position = [index for index, node in enumerate(nodes) if node in chain.nodes]
    barrier = next(filter(is_barrier, nodes[position[0] : position[-1]]), None)
    if barrier is not None:
        return f"{describe_node(barrier)} changes how ops run from one of its ops to the next"
    return "random numbers drawn, or values written, between its blocks must keep their order"


def rewrite_chains(graph: fx.Graph, chains: Sequence[FoundChain], names: Sequence[str], stack: Stack) -> fx.Graph:
    """A graph in which each chain is one call of a solve node.

    Args:
        graph: the graph that the chains were found in; it is left as it is.
        chains: chains that `sortable_chains` returned together.
        names: for each chain the attribute that holds its solve node.
        stack: emits the node that stacks a per-block operand: `(new_graph, its L old nodes, old to new) -> node`.
    """
    order = _order(graph, chains)
    assert order is not None, "chains that cannot be sorted are to be dropped before"
    new, copies, barriers = fx.Graph(), dict[fx.Node, fx.Node](), _barriers_before(graph)
    last_writes = _last_writes(graph)
    new.set_codegen(graph._codegen)
    for item in order:
        if isinstance(item, int):
            kept = _keep_written(new, chains[item], copies, last_writes)
            _emit(new, chains[item], names[item], stack, copies, kept, barriers)
        else:
            copies[item] = copy_node(new, item, copies)
    for node in reversed(list(new.nodes)):
        if not node.users and (
            node.op == "get_attr"
            or node.target is number_of_whole
            or any(_is(node, name) for name in ("unbind", "getitem", "select", "embedding"))
        ):
            new.erase_node(node)
    return new


def _barriers_before(graph: fx.Graph) -> dict[fx.Node, int]:
    """For each node how many ops before it change how all later ops run."""
    return dict(zip(graph.nodes, itertools.accumulate(map(is_barrier, graph.nodes)), strict=True))


def _last_writes(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For each node whose memory is written to the last op that does so."""
    return {alias: writers[-1] for aliases, writers in written_memory(graph) for alias in aliases}


def _keep_written(
    new: fx.Graph, found: FoundChain, copies: dict[fx.Node, fx.Node], last_writes: dict[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Copies of what a chain is given and the model writes to behind it: the chain's backward reads it as it was."""
    columns = itertools.chain(found.operands, found.head_operands)
    given = dict.fromkeys((*found.initial, *found.shared, *found.head_shared, *itertools.chain.from_iterable(columns)))
    first = min(found.nodes)
    written = [node for node in given if node in last_writes and first < last_writes[node]]
    kept = {node: new.call_method("clone", (copies[node],)) for node in written}
    for node, copy in kept.items():
        copy.meta = dict(node.meta)
    return kept


def _emit(
    new: fx.Graph,
    found: FoundChain,
    name: str,
    stack: Stack,
    copies: dict[fx.Node, fx.Node],
    kept: dict[fx.Node, fx.Node],
    barriers: dict[fx.Node, int],
) -> None:
    given_as = copies | kept if kept else copies
    initial = [given_as[node] for node in found.initial]
    inside = {barriers[node] for node in found.nodes}
    emitted: dict[tuple[fx.Node, ...], fx.Node] = {}
    for operand in (*found.operands, *found.head_operands):
        if operand in emitted:
            continue
        if not kept.keys().isdisjoint(operand):
            emitted[operand] = new.call_function(stack_operands, ([given_as[node] for node in operand],))
            continue
        # Parts that were taken elsewhere, without gradients, say, are taken there.
        whole = _cut_before(new, operand, copies) if {barriers[node] for node in _cutting(operand)} == inside else None
        if whole is None and {barriers[node] for node in operand} == inside:
            whole = _looked_up_before(new, operand, copies)
        if whole is None and all(_is_tap(copies[node]) for node in operand):
            # States of another chain; `collect.py` may find them to be its trajectory.
            whole = new.call_function(stack_operands, ([copies[node] for node in operand],))
        emitted[operand] = whole or stack(new, operand, copies)
    given = [
        initial,
        [emitted[operand] for operand in found.operands],
        [given_as[node] for node in found.shared],
    ]
    if found.chain.head is not None:
        given.append([emitted[operand] for operand in found.head_operands])
        given.append([given_as[node] for node in found.head_shared])
    which = None if found.chain.as_written is None else found.chain.as_written[1]
    if which is not None:
        marks = which.states, which.operands, which.shared, which.head_operands, which.head_shared
        given = [_as_reals(new, nodes, each) for nodes, each in zip(given, marks, strict=False)]
    taken = new.call_module(name, tuple(given))
    for position, (index, block) in enumerate(found.leaving.taps):
        value = found.values[index][block]
        part = new.call_function(operator.getitem, (taken, position))
        if which is not None and (*which.states, *which.outputs)[index]:
            part = new.call_function(complex_of_parts, (part,))
        if index < len(found.wholes) and found.wholes[index] is not None:
            part = new.call_function(whole_of_number, (part, found.wholes[index]))
        copies[value] = part
        copies[value].meta = dict(value.meta)


def _as_reals(new: fx.Graph, nodes: Sequence[fx.Node], are_complex: Sequence[bool]) -> list[fx.Node]:
    """What stands for the real and imaginary parts of those nodes that are complex."""
    made = []
    for node, is_complex in zip(nodes, are_complex, strict=True):
        made.append(new.call_function(parts_of_complex, (node,)) if is_complex else node)
    return made


def _is_tap(node: fx.Node) -> bool:
    return node.target is operator.getitem and node.args[0].op == "call_module"  # type: ignore[union-attr]


def _cut_before(new: fx.Graph, operand: Sequence[fx.Node], copies: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """A per-block operand that one tensor was cut into, as that tensor: an unrolled recurrence has one at each step."""
    if any(user.op == "output" for node in operand for user in node.users):
        return None  # who gets a part may ask for its gradient
    cuts = [cut for cut in map(_cut, operand) if cut is not None]
    if len(cuts) < len(operand) or len({cut[:2] for cut in cuts}) > 1:
        return _cut_within(new, operand, copies)
    whole, dim, _ = cuts[0]
    row = _regular([index for _, _, index in cuts])
    return None if row is None else new.call_function(stack_parts, (copies[whole], dim, *row))


def _regular(indices: Sequence[int]) -> tuple[int, int, int] | None:
    """The first of some indices, how many there are, and their distance, if that is the same for all."""
    first = indices[0]
    step = indices[1] - first if len(indices) > 1 else 1
    if step == 0 or list(indices) != list(range(first, first + step * len(indices), step)):
        return None
    return first, len(indices), step


def _cut_within(new: fx.Graph, operand: Sequence[fx.Node], copies: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """`_cut_before` of `x[i, 2]` and the like: a part of what all blocks have alike."""
    whole, index = operand[0].args[:2] if len(operand[0].args) == 2 else (None, None)
    if not isinstance(whole, fx.Node) or not _is_tensor(whole) or not isinstance(index, tuple):
        return None
    columns = _indices(operand, whole, len(index))
    moving = [place for place, column in enumerate(columns) if any(one != column[0] for one in column)]
    if len(moving) != 1 or not all(type(one) is int and one >= 0 for one in columns[moving[0]]):
        return None
    row = _regular(columns[moving[0]])
    if row is None:
        return None
    fixed = tuple(slice(None) if place in moving else item for place, item in enumerate(index))
    part = new.call_function(operator.getitem, (copies[whole], fixed))
    part.meta = {**operand[0].meta}
    with torch.no_grad():
        part.meta["example_value"] = whole.meta["example_value"][fixed]
    dim = sum(isinstance(item, slice) for item in index[: moving[0]])
    return new.call_function(stack_parts, (part, dim, *row))


def _indices(operand: Sequence[fx.Node], whole: fx.Node, count: int) -> list[list[Any]]:
    """What the blocks index one tensor by, for each of its dimensions; none but for integers and whole slices."""
    rows = []
    for node in operand:
        index = node.args[1] if node.target is operator.getitem and len(node.args) == 2 else None
        if not isinstance(index, tuple) or len(index) != count or node.args[0] is not whole:
            return []
        if not all(type(item) is int or item == slice(None) for item in index):
            return []
        rows.append(index)
    return [list(column) for column in zip(*rows, strict=True)]


def _looked_up_before(new: fx.Graph, operand: Sequence[fx.Node], copies: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """A per-block operand of rows of one table, looked up all at once."""
    found = [lookup(node) for node in operand]
    tables = {each[0] for each in found if each is not None}
    if None in found or len(tables) > 1 or any(user.op == "output" for node in operand for user in node.users):
        return None
    places = [each[1] for each in found if each is not None]
    stacked = _cut_before(new, places, copies) or new.call_function(
        stack_operands, ([copies[node] for node in places],)
    )
    (table,), first = tables, operand[0]
    exchanged = {table: copies[table], places[0]: stacked}
    whole = new.create_node(first.op, first.target, *fx.node.map_arg((first.args, first.kwargs), exchanged.__getitem__))
    for node, part in ((stacked, places[0]), (whole, first)):
        value = part.meta.get("example_value")
        node.meta = dict(part.meta)
        if isinstance(value, torch.Tensor):
            with torch.no_grad():
                node.meta["example_value"] = value.new_empty((len(operand), *value.shape))
    return whole


def _cutting(operand: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes that cut a tensor into these parts."""
    return {*operand, *(source for node in operand for source in node.all_input_nodes if _is(source, "unbind"))}


def _is(node: fx.Node, name: str) -> bool:
    """Whether a node is PyTorch's or Python's op of this name, and not one that a model's author called so."""
    known = node.op == "call_method" or (node.op == "call_function" and is_pytorchs(node.target))
    return known and op_name(node) == name


def _cut(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """The tensor, dimension and index of `x[i]`, `x[:, i]`, `x.select(1, i)` and `x.unbind(1)[i]`."""
    whole, *where = node.args or (None,)
    dim: Any = 0
    index: Any = where[-1] if where else None
    if node.kwargs or not isinstance(whole, fx.Node):
        return None
    if _is(node, "select") and len(where) == 2:
        dim = where[0]
    elif node.target is not operator.getitem:
        return None
    elif _is(whole, "unbind"):
        whole, dim = argument(whole, 0, "input"), argument(whole, 1, "dim", 0)
    elif isinstance(index, tuple) and index and all(one == slice(None) for one in index[:-1]):
        dim, index = len(index) - 1, index[-1]
    is_cut = type(index) is int and index >= 0 and type(dim) is int and isinstance(whole, fx.Node) and _is_tensor(whole)
    return (whole, dim, index) if is_cut else None


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.Tensor)


def _order(
    graph: fx.Graph, chains: Sequence[FoundChain], effects: Iterable[tuple[fx.Node, fx.Node]] | None = None
) -> list[fx.Node | int] | None:
    """Nodes and chains (by index) in an order that can be run; `None` if a chain would have to wait for itself.

    `effects` are the pairs that keep their order beside those that data orders: by default, all that must.
    """
    owner = {node: index for index, chain in enumerate(chains) for node in chain.nodes}
    position = {node: index for index, node in enumerate(graph.nodes)}
    dag = nx.DiGraph()

    def before(first: fx.Node, second: fx.Node) -> None:
        a, b = owner.get(first, first), owner.get(second, second)
        if a is not b and a != b:
            dag.add_edge(a, b)

    for node in graph.nodes:
        dag.add_node(owner.get(node, node))
        for source in node.all_input_nodes:
            before(source, node)
    for first, second in _effect_order(graph) if effects is None else effects:
        before(first, second)
    first_of = [min(position[node] for node in chain.nodes) for chain in chains]
    try:
        return list(
            nx.lexicographical_topological_sort(
                dag, key=lambda item: first_of[item] if isinstance(item, int) else position[item]
            )
        )
    except nx.NetworkXUnfeasible:
        return None


def _effect_order(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Pairs that must keep their order though no value passes between them."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    others = [node for node in graph.nodes if node.op != "placeholder"]
    yield from itertools.pairwise(inputs)
    if inputs:
        yield from ((inputs[-1], node) for node in others)
    # Random numbers are drawn in the order written.
    yield from itertools.pairwise(node for node in others if is_random(node) or hides_ops(node))
    position = {node: index for index, node in enumerate(graph.nodes)}
    for aliases, writers in written_memory(graph):
        touching = aliases.union(*(alias.users for alias in aliases))
        yield from _around(sorted(touching, key=position.__getitem__), set(writers))
    yield from _around(others, {node for node in others if is_barrier(node)})


def _around(nodes: Sequence[fx.Node], fences: set[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Pairs that keep every node on its side of every fence."""
    fence: fx.Node | None = None
    since: list[fx.Node] = []
    for node in nodes:
        if fence is not None:
            yield fence, node
        if node in fences:
            yield from ((earlier, node) for earlier in since)
            fence, since = node, []
        else:
            since.append(node)


def depth(graph: fx.Graph, chains: Sequence[FoundChain]) -> tuple[int, int]:
    """Ops on the longest path through the graph, and how many of them lie in chains."""
    inside = {node for chain in chains for node in chain.nodes}
    best: dict[Any, tuple[int, int]] = {}
    deepest = (0, 0)
    for node in graph.nodes:
        longest = max((best[source] for source in node.all_input_nodes), default=(0, 0))
        counts = node.op.startswith("call_")
        best[node] = (longest[0] + counts, longest[1] + (counts and node in inside))
        deepest = max(deepest, best[node])
    return deepest
