"""Put a call of a common body where each block of a region stood."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch.amp.autocast_mode import _exit_autocast

from pcr_fx.passes.inline import copy_node
from pcr_fx.passes.regions import Block, Region


def outline(graph: fx.Graph, regions: Mapping[str, Region]) -> fx.Graph:
    """A graph with a call of `invoke_subgraph` for each block.

    Args:
        graph: the graph that the regions were found in; it is left as it is.
        regions: by the attribute that is to hold the body (see `body_of`), which also tells compilers which calls are alike.
    """
    new, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    new.set_codegen(graph._codegen)
    last = {block.ops[-1]: _Call(name, region, block) for name, region in regions.items() for block in region.blocks}
    within = {node for call in last.values() for node in call.block.ops}
    for node in graph.nodes:
        if node in last:
            last[node].emit(new, copies)
        elif node not in within:
            copies[node] = copy_node(new, node, copies)
    return new


def body_of(region: Region) -> fx.GraphModule:
    """What the blocks compute: `(*inputs) -> (*outputs, *what is to be written to inputs)`."""
    block, graph, copies = region.blocks[0], fx.Graph(), dict[fx.Node, fx.Node]()
    for index, node in enumerate(block.inputs):
        copies[node] = graph.placeholder(f"input_{index}")
        copies[node].meta = _value_meta(node)
    # A region may not write to what it is given.
    for index in region.written:
        node = block.inputs[index]
        copies[node] = _cloned(graph, node, copies[node])
    modes = [graph.call_function(node.target, node.args) for node in block.autocast]  # type: ignore[arg-type]
    for node in block.ops:
        copies[node] = copy_node(graph, node, copies)
    for mode in reversed(modes):
        graph.call_function(_exit_autocast, (mode,))
    results = [block.ops[index] for index in region.outputs] + _written(region, block)
    graph.output(tuple(copies[node] for node in results))
    return fx.GraphModule({}, graph)


@dataclass(frozen=True, eq=False)
class _Call:
    name: str
    region: Region
    block: Block

    def emit(self, new: fx.Graph, copies: dict[fx.Node, fx.Node]) -> None:
        body = new.create_node("get_attr", self.name)
        given = [copies[node] for node in self.block.inputs]
        for index in self.region.written:
            # The backward of a region holds all that it was given, as it was.
            given[index] = _cloned(new, self.block.inputs[index], given[index])
        # Where a region enters autocast itself, its backward is traced outside of it, as that of other ops runs.
        modes = [new.call_function(node.target, _switched_off(node)) for node in self.block.autocast]  # type: ignore[arg-type]
        call = new.call_function(invoke_subgraph, (body, self.name, *given))
        for mode in reversed(modes):
            new.call_function(_exit_autocast, (mode,))
        results = [self.block.ops[index] for index in self.region.outputs]
        written = _written(self.region, self.block)
        call.meta = {**self.block.ops[-1].meta, "example_value": tuple(_value(node) for node in results + written)}
        for index, node in enumerate(results + written):
            part = new.call_function(operator.getitem, (call, index))
            part.meta = dict(node.meta)
            if index < len(results):
                copies[node] = part
            else:
                new.call_method("copy_", (copies[node], part)).meta = _value_meta(node)


def _switched_off(autocast: fx.Node) -> tuple[Any, ...]:
    """The arguments that switch autocast off for the device that an op switches it for."""
    device, dtype, _, *cache = autocast.args
    return device, dtype, False, *cache


def _cloned(graph: fx.Graph, node: fx.Node, copy: fx.Node) -> fx.Node:
    """A copy in `graph` of what stands there for `node`."""
    clone = graph.call_method("clone", (copy,))
    clone.meta = _value_meta(node)
    return clone


def _written(region: Region, block: Block) -> list[fx.Node]:
    return [block.inputs[index] for index in region.written]


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _value_meta(node: fx.Node) -> dict[str, Any]:
    return {"example_value": _value(node)}
