"""Have functions with derivatives of their own, which are called with another number in each block, take it as an argument.

What such a function is called with stands in its ops, or is known to its author's code alone. Read with the numbers of each call,
it is one function of them where its ops are the same but for numbers at which a tensor may stand as well.
"""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pcr_fx.graphs.nodes import hashable, op_name
from pcr_fx.graphs.parts import OwnDerivative, OwnFunction, content_of, own_derivative
from pcr_fx.passes.isomorphism import CHOICES, SCALAR_OPS
from pcr_fx.passes.kinds import flatten_arguments, spec_of
from pcr_fx.passes.own_graphs import OwnGraphs, read_function
from pcr_fx.passes.varying_numbers import write_numbers_out

# How often a function has to be called to stand in the blocks of a chain.
_OFTEN = 4


def take_numbers_over(graph: fx.Graph) -> None:
    """Make one of the functions of a captured graph that differ in numbers alone."""
    read: dict[fx.Node, OwnGraphs] = {}
    for nodes in _alike(graph, _call_of):
        read |= _read(nodes)
    for nodes in _alike(graph, lambda node: _form(read[node]) if node in read else None):
        _take_over(nodes, read)


def _alike(graph: fx.Graph, key: Callable[[fx.Node], Hashable]) -> Iterator[list[fx.Node]]:
    """Nodes of one key that call several functions."""
    found: dict[Hashable, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if isinstance(node.target, (OwnDerivative, OwnFunction)) and (one := key(node)) is not None:
            found[one].append(node)
    for nodes in found.values():
        if len(nodes) >= _OFTEN and len({node.target for node in nodes}) > 1:
            yield nodes


# --- reading -----------------------------------------------------------------------------------------------------------------


def _call_of(node: fx.Node) -> Hashable:
    """What a function is called with but for numbers; of one whose ops are known already, how many there are."""
    target, specs = node.target, tuple(spec_of(one.meta.get("example_value")) for one in node.all_input_nodes)
    if isinstance(target, OwnDerivative):
        return OwnDerivative, len(target.graph.graph.nodes), len(target.backward.graph.nodes), specs
    try:
        key = target.function, hashable(target.arguments, _whatever_number), specs  # type: ignore[union-attr]
        hash(key)
    except TypeError:
        return None
    return key


def _whatever_number(value: Any) -> Any:
    """The same for all numbers; truth values are none."""
    return _whatever_number if type(value) in (int, float) else value


def _read(nodes: Sequence[fx.Node]) -> dict[fx.Node, OwnGraphs]:
    """Graphs of the function that each node calls, of those that can be read."""
    read: dict[Any, OwnGraphs | None] = {}
    for node in nodes:
        if node.target not in read:
            read[node.target] = _graphs_of(node)
    found = [one for one in read.values() if one is not None]
    if len(set(map(_form, found))) == 1:
        _write_out([one.forward for one in found])
        _write_out([one.backward for one in found])
    return {node: one for node in nodes if (one := read[node.target]) is not None}


def _graphs_of(node: fx.Node) -> OwnGraphs | None:
    target: Any = node.target
    if isinstance(target, OwnFunction):
        values = (one.meta.get("example_value") for one in node.args if isinstance(one, fx.Node))
        examples = [one for one in values if isinstance(one, Tensor)]
        return read_function(target, examples) if len(examples) == len(node.args) else None
    return OwnGraphs(_copy(target.graph.graph), _copy(target.backward.graph), tuple(sorted(target.fixed)))


def _copy(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


def _form(graphs: OwnGraphs) -> Hashable:
    """What the graphs compute, whatever their numbers are."""
    contents = (content_of(graph, _whatever_number) for graph in (graphs.forward, graphs.backward))
    return *contents, graphs.fixed, graphs.is_single


def _write_out(graphs: Sequence[fx.Graph]) -> None:
    """Write out, in sums, products and choices, ops whose numbers differ where only a number may stand."""
    varying = [node for node, slot, _ in _varying(graphs) if not _takes_tensor(node, slot)]
    kinds = {(node.op, node.target) for node in varying}
    write_numbers_out([node for graph in graphs for node in graph.nodes if (node.op, node.target) in kinds])


# --- taking over -------------------------------------------------------------------------------------------------------------


def _varying(graphs: Sequence[fx.Graph]) -> Iterator[tuple[fx.Node, int, tuple[Any, ...]]]:
    """The arguments that differ from graph to graph: an op of the first one, which argument, and what it is in each."""
    for column in zip(*(list(graph.nodes) for graph in graphs), strict=True):
        for slot, values in enumerate(zip(*map(flatten_arguments, column), strict=True)):
            if not isinstance(values[0], fx.Node) and len(set(map(hashable, values))) > 1:
                yield column[0], slot, values


def _takes_tensor(node: fx.Node, slot: int) -> bool:
    """Whether a tensor may stand for the number that an op takes, beside a tensor that gives the dtype."""
    values = [one.meta.get("example_value") for one in node.all_input_nodes]
    beside = [one.dim() for one in values if isinstance(one, Tensor) and one.is_floating_point()]
    takes = (op_name(node) in SCALAR_OPS and len(node.args) == 2) or op_name(node) in CHOICES
    return takes and any(beside) and slot < len(node.args)


def _take_over(nodes: Sequence[fx.Node], read: Mapping[fx.Node, OwnGraphs]) -> None:
    """Let all nodes call one function, if it can be made."""
    graphs = list(dict.fromkeys(read[node] for node in nodes))
    first, varying = graphs[0], list[tuple[fx.Node, int, tuple[Any, ...]]]()
    for every in ([one.forward for one in graphs], [one.backward for one in graphs]):
        varying += _varying(every)
    if not all(_takes_tensor(node, slot) for node, slot, _ in varying):
        return
    columns = list(dict.fromkeys(tuple(map(float, values)) for _, _, values in varying))
    outputs, saved = _result(first.forward)
    _return(first.forward, (outputs, (*saved, *_insert(first.forward, columns, varying))))
    _insert(first.backward, columns, varying)
    _return(first.backward, (*_result(first.backward), *(None for _ in columns)))
    made = own_derivative(first.forward, first.backward, first.fixed)
    for node in nodes:
        which = graphs.index(read[node])
        node.target, node.args = made, (*node.args, *(values[which] for values in columns))
        if first.is_single:
            _take_first(node)


def _result(graph: fx.Graph) -> Any:
    return graph.output_node().args[0]


def _return(graph: fx.Graph, result: Any) -> None:
    graph.output_node().args = (result,)


def _insert(graph: fx.Graph, columns: Sequence[Any], varying: Sequence[tuple[fx.Node, int, Any]]) -> list[fx.Node]:
    """Make numbers the last inputs of a graph; those."""
    inputs = list(graph.find_nodes(op="placeholder"))
    with graph.inserting_after(inputs[-1]):
        made = [graph.placeholder(f"number_{index}") for index in reversed(range(len(columns)))][::-1]
    for node, places in itertools.groupby((one for one in varying if one[0].graph is graph), key=lambda one: one[0]):
        put = {slot: made[columns.index(tuple(map(float, values)))] for _, slot, values in places}
        _put(node, put)
        if isinstance(node.target, torch._ops.OpOverload):  # which is of numbers
            node.target = node.target.overloadpacket
    return made


def _put(node: fx.Node, arguments: Mapping[int, fx.Node]) -> None:
    """Have an op take others for some of the leaves of its arguments."""
    slots = itertools.count()
    replaced: Any = fx.node.map_aggregate((node.args, node.kwargs), lambda leaf: arguments.get(next(slots), leaf))
    node.args, node.kwargs = replaced


def _take_first(node: fx.Node) -> None:
    """Have those who read what a node returns read the first item of it."""
    with node.graph.inserting_after(node):
        first = node.graph.call_function(operator.getitem, (node, 0))
    first.meta = dict(node.meta)
    node.replace_all_uses_with(first, delete_user_cb=lambda user: user is not first)
    node.meta["example_value"] = (first.meta["example_value"],)
