"""Put a solve node where each planned chain stood."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import networkx as nx
from torch import fx

from pcr_fx.passes.detect import FoundChain
from pcr_fx.passes.effects import is_random, op_name, written_nodes, writes

Stack = Callable[[fx.Graph, Sequence[fx.Node], dict[fx.Node, fx.Node]], fx.Node]

# Ops that change how all later ops run.
_BARRIERS = frozenset(
    "set_grad_enabled enter_autocast exit_autocast enter_inference_mode exit_inference_mode "
    "saved_tensors_hooks_enable saved_tensors_hooks_disable".split()
)


def sortable_chains(graph: fx.Graph, chains: Sequence[FoundChain]) -> list[FoundChain]:
    """The chains that can each be evaluated at one point of the graph's order, together."""
    if _order(graph, chains) is not None:
        return list(chains)
    kept: list[FoundChain] = []
    for chain in chains:
        if _order(graph, [*kept, chain]) is not None:
            kept.append(chain)
    return kept


def rewrite_chains(
    graph: fx.Graph, chains: Sequence[FoundChain], names: Sequence[str], stack: Stack
) -> fx.Graph:
    """A graph in which each chain is one call of a solve node.

    Args:
        graph: the graph that the chains were found in; it is left as it is.
        chains: chains that `sortable_chains` returned together.
        names: for each chain the attribute that holds its solve node.
        stack: emits the node that stacks a per-block operand: `(new_graph, its L old nodes, old to new) -> node`.
    """
    order = _order(graph, chains)
    assert order is not None, "chains that cannot be sorted are to be dropped before"
    new, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    new.set_codegen(graph._codegen)
    for item in order:
        if isinstance(item, int):
            _emit(new, chains[item], names[item], stack, copies)
        else:
            copies[item] = new.node_copy(item, copies.__getitem__)
            if hasattr(item, "_dynamo_source"):
                # Where Dynamo found an input: AOTAutograd asks each placeholder for it.
                copies[item]._dynamo_source = item._dynamo_source  # type: ignore[attr-defined]
    for node in reversed(list(new.nodes)):
        if node.op == "get_attr" and not node.users:
            new.erase_node(node)
    return new


def _emit(
    new: fx.Graph, found: FoundChain, name: str, stack: Stack, copies: dict[fx.Node, fx.Node]
) -> None:
    initial = [copies[node] for node in found.initial]
    operands = [stack(new, column, copies) for column in found.operands]
    shared = [copies[node] for node in found.shared]
    trajectories = new.call_module(name, (initial, operands, shared))
    for index, states in enumerate(found.states):
        trajectory = None
        for block, state in enumerate(states):
            if all(user in found.nodes for user in state.users):
                continue
            if trajectory is None:
                trajectory = new.call_function(operator.getitem, (trajectories, index))
            # A copy: a view would keep the whole trajectory alive, and pass writes to it on to the backward.
            view = new.call_function(operator.getitem, (trajectory, block))
            copies[state] = new.call_method("clone", (view,))
            copies[state].meta = dict(state.meta)


def _order(graph: fx.Graph, chains: Sequence[FoundChain]) -> list[fx.Node | int] | None:
    """Nodes and chains (by index) in an order that can be run; `None` if a chain would have to wait for itself."""
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
    for first, second in _effect_order(graph, position):
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


def _effect_order(graph: fx.Graph, position: dict[fx.Node, int]) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs that must keep their order though no value passes between them."""
    pairs = []
    # Placeholders stay in front, random ops draw in the order written.
    nodes = list(graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    pairs += list(zip(inputs, inputs[1:], strict=False))
    if inputs and len(nodes) > len(inputs):
        pairs += [(inputs[-1], node) for node in nodes if node.op != "placeholder"]
    random = [node for node in nodes if node.op.startswith("call_") and is_random(node)]
    pairs += list(zip(random, random[1:], strict=False))
    writers = {node for node in nodes if writes(node)}
    if writers:
        for alias in written_nodes(graph):
            touching = [alias, *alias.users]
            for writer in writers.intersection(touching):
                pairs += [
                    (other, writer) if position[other] < position[writer] else (writer, other)
                    for other in touching
                    if other is not writer
                ]
    pairs += _around_barriers(nodes)
    return pairs


def _around_barriers(nodes: Sequence[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    pairs: list[tuple[fx.Node, fx.Node]] = []
    barrier, since = None, []
    for node in nodes:
        if node.op == "placeholder":
            continue
        if barrier is not None:
            pairs.append((barrier, node))
        if node.op == "call_function" and op_name(node) in _BARRIERS:
            pairs += [(earlier, node) for earlier in since]
            barrier, since = node, []
        else:
            since.append(node)
    return pairs


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
