"""Write graphs that others call out into these: regions marked with `torch.compiler.nested_compile_region`, checkpointed blocks.

What their authors marked as repeating, or worth to be computed again, is most likely a block of a chain.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import fx
from torch._functorch.autograd_function import autograd_function_apply
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.utils.checkpoint import CheckpointPolicy

from pcr_fx.graphs.effects import does_more
from pcr_fx.graphs.parts import Part, own_derivative
from pcr_fx.passes.writes import write_out

# By what calls a graph: which of its arguments are those of the graph.
_FIRST_ARGUMENT = {invoke_subgraph: 2, tag_activation_checkpoint: 1}


def holds_regions(graph: fx.Graph) -> bool:
    """Whether any op of a graph calls one that could be written out."""
    return any(node.target in _FIRST_ARGUMENT or node.target is autograd_function_apply for node in graph.nodes)


def inline_regions(module: fx.GraphModule) -> fx.Graph:
    """The graph of `module` with every region in place of the ops that call it; `module` is left as it is."""
    graph = fx.Graph()
    graph.set_codegen(module.graph._codegen)
    result = _Inlining(module, graph).write_out("", {}, {})
    graph.output(result).meta = dict(module.graph.output_node().meta)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return graph


class _Inlining:
    """The graphs of a module on their way into one."""

    def __init__(self, module: fx.GraphModule, graph: fx.Graph) -> None:
        self.module, self.graph = module, graph
        self.checkpoints = itertools.count()

    def write_out(self, path: str, copies: dict[fx.Node, Any], meta: dict[str, Any]) -> Any:
        """Copy the ops of the region at `path`; what it returns.

        Args:
            copies: holds its inputs.
            meta: what is said of every op of it.
        """
        region: Any = self.module.get_submodule(path)
        for node in region.graph.nodes:
            if node in copies:
                continue
            if node.op == "output":
                return fx.node.map_arg(node.args[0], copies.__getitem__)
            if self._may_be_written_out(node, path):
                copies[node] = self._region(node, path, copies, meta)
            elif node.target is operator.getitem and not isinstance(copies[node.args[0]], fx.Node):
                copies[node] = copies[node.args[0]][node.args[1]]
            else:
                copies[node] = self._op(node, path, copies)
                copies[node].meta |= meta
        raise AssertionError("a region without an output")

    def _may_be_written_out(self, node: fx.Node, path: str) -> bool:
        """Whether a region is nothing but its ops: what a checkpoint is to keep may be a choice of its author."""
        if node.target is tag_activation_checkpoint:
            region: Any = self.module.get_submodule(_join(path, node.args[0].target))  # type: ignore[union-attr]
            return "_checkpoint_context_fn" not in region.meta
        return node.target is invoke_subgraph

    def _region(self, node: fx.Node, path: str, copies: dict[fx.Node, Any], meta: dict[str, Any]) -> Any:
        inner = _join(path, node.args[0].target)  # type: ignore[union-attr]
        region: Any = self.module.get_submodule(inner)
        arguments = fx.node.map_arg(node.args[_FIRST_ARGUMENT[node.target] :], copies.__getitem__)  # type: ignore[index]
        given = dict(zip(region.graph.find_nodes(op="placeholder"), arguments, strict=True))
        # The region may be one of many that were traced once: it stands where it is called.
        stack = node.meta.get("nn_module_stack")
        if stack and "nn_module_stack" not in meta:
            meta = {**meta, "nn_module_stack": stack}
        if node.target is tag_activation_checkpoint and "recompute" not in meta:
            # For the compiler of what is no chain in the end.
            meta = {**meta, "recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": next(self.checkpoints)}
        return self.write_out(inner, given, meta)

    def _op(self, node: fx.Node, path: str, copies: dict[fx.Node, Any]) -> fx.Node:
        derived = self._with_derivative(node, path)
        if derived is not None:
            copy = self.graph.call_function(derived, fx.node.map_arg(node.args[2:], copies.__getitem__))  # type: ignore[arg-type]
            copy.meta = dict(node.meta)
            return copy
        copy = copy_node(self.graph, node, copies)
        if node.op == "get_attr":
            copy.target = _join(path, node.target)
        return copy

    def _with_derivative(self, node: fx.Node, path: str) -> Part | None:
        """The function with a derivative of its own that an op calls, if that does no more than compute."""
        if node.target is not autograd_function_apply or node.kwargs.get("dirty_idx"):
            return None
        paths = [_join(path, one.target) for one in node.args[:2]]  # type: ignore[union-attr]
        graphs: list[Any] = [self.module.get_submodule(one) for one in paths]
        forward, backward = (_without_grad_modes(one.graph) for one in graphs)
        if forward is None or backward is None:
            return None
        if not all(isinstance(one, fx.Node) for one in forward.output_node().args[0][0]):  # type: ignore[index, union-attr]
            return None
        return own_derivative(forward, backward, node.kwargs["non_differentiable_idx"])  # type: ignore[arg-type]


def _without_grad_modes(graph: fx.Graph) -> fx.Graph | None:
    """A copy of a forward or backward without the ops that switch gradients off first and on last, which autograd does, and without
    writes to what it makes itself.

    `None` where more than that is done beside computing.
    """
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    ops = [node for node in copy.nodes if node.op not in ("placeholder", "output")]
    switches = [node for node in ops if node.target is torch._C._set_grad_enabled]
    if switches and (len(switches) != 2 or [ops[0], ops[-1]] != switches or switches[0].args != (False,)):
        return None
    for node in switches:
        copy.erase_node(node)
    write_out(copy)
    ops = [node for node in copy.nodes if node.op not in ("placeholder", "output")]
    if any(node.op == "get_attr" or does_more(node) for node in ops):
        return None
    return copy


def _join(*names: Any) -> str:
    return ".".join(filter(None, map(str, names)))


def copy_node(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, Any]) -> fx.Node:
    """`node` in another graph."""
    copied = graph.node_copy(node, copies.__getitem__)
    if hasattr(node, "_dynamo_source"):
        # Where Dynamo found an input: AOTAutograd asks each placeholder for it.
        copied._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
    return copied
