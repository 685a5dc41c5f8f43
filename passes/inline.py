"""Write regions that were marked with `torch.compiler.nested_compile_region` out into the graph that calls them."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph


def holds_regions(graph: fx.Graph) -> bool:
    """Whether any op of a graph calls a marked region."""
    return any(node.target is invoke_subgraph for node in graph.nodes)


def inline_regions(module: fx.GraphModule) -> fx.Graph:
    """The graph of `module` with every region in place of the ops that call it; `module` is left as it is.

    A region that its author marked as repeating is most likely a block of a chain.
    """
    graph = fx.Graph()
    graph.set_codegen(module.graph._codegen)
    result = _write_out(graph, module, "", {}, None)
    graph.output(result).meta = dict(module.graph.output_node().meta)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return graph


def _write_out(graph: fx.Graph, module: fx.GraphModule, path: str, copies: dict[fx.Node, Any], stack: Any) -> Any:
    """Copy the ops of the region at `path`; what it returns. `copies` holds its inputs."""
    region: Any = module.get_submodule(path)
    for node in region.graph.nodes:
        if node in copies:
            continue
        if node.op == "output":
            return fx.node.map_arg(node.args[0], copies.__getitem__)
        if node.target is invoke_subgraph:
            inner = _join(path, node.args[0].target)
            inputs: Any = module.get_submodule(inner)
            arguments = fx.node.map_arg(node.args[2:], copies.__getitem__)
            given = dict(zip(inputs.graph.find_nodes(op="placeholder"), arguments, strict=True))
            copies[node] = _write_out(graph, module, inner, given, stack or node.meta.get("nn_module_stack"))
        elif node.target is operator.getitem and not isinstance(copies[node.args[0]], fx.Node):
            copies[node] = copies[node.args[0]][node.args[1]]
        else:
            copies[node] = copy_node(graph, node, copies)
            if node.op == "get_attr":
                copies[node].target = _join(path, node.target)
            if stack:
                # The region may be one of many that were traced once: it stands where it is called.
                copies[node].meta["nn_module_stack"] = stack
    raise AssertionError("a region without an output")


def _join(*names: Any) -> str:
    return ".".join(filter(None, map(str, names)))


def copy_node(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, Any]) -> fx.Node:
    """`node` in another graph."""
    copied = graph.node_copy(node, copies.__getitem__)
    if hasattr(node, "_dynamo_source"):
        # Where Dynamo found an input: AOTAutograd asks each placeholder for it.
        copied._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
    return copied
