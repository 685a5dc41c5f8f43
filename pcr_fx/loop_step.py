"""One step of a loop as a graph, and what of it computes some of its results."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pcr_fx.errors import BodyError, UnsupportedError
from pcr_fx.graphs.effects import hides_ops, is_barrier, is_of_transform, writes, written_nodes
from pcr_fx.graphs.nodes import op_name
from pcr_fx.passes.inline import inline_regions
from pcr_fx.passes.normalise import normalise_graph


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a loop, called as `graph(*carry, *xs, *shared)`, a tuple of the new carry and of the outputs.

    Attributes:
        graph: in the ops that it was captured in.
        num_carry, num_xs: tensors that are handed on, and tensors of which each step has a part.
        name, source: for what is reported.
    """

    graph: fx.GraphModule
    num_carry: int
    num_xs: int
    name: str = "step"
    source: str = ""

    @classmethod
    def of(cls, graph: fx.GraphModule, num_carry: int, num_xs: int, name: str = "step", source: str = "") -> Step:
        """The step in its normal form.

        Raises:
            UnsupportedError: it writes into its carry or into a part of `xs`, or returns a carry of another form.
        """
        written_out = inline_regions(graph)
        normalise_graph(written_out)
        graph = fx.GraphModule(graph, written_out)
        written = written_nodes(graph.graph)
        for index, node in enumerate(graph.graph.find_nodes(op="placeholder")[: num_carry + num_xs]):
            if node in written:
                what = "carry" if index < num_carry else "slice of xs"
                raise UnsupportedError(f"combine_fn may not write into its {what} in place; return a new tensor")
        step = cls(graph, num_carry, num_xs, name, source)
        for before, after in zip(step.inputs[:num_carry], step.results, strict=False):
            check_carry(before.meta.get("example_value"), after.meta.get("example_value"))
        return step

    @property
    def content(self) -> Hashable:
        """All that the step is; `None` where it holds tensors or graphs of its own."""
        nodes = list(self.graph.graph.nodes)
        if any(node.op == "get_attr" for node in nodes):
            return None
        values = [node.meta.get("example_value") for node in (*self.inputs, *self.results)]
        specs = tuple((one.shape, one.dtype, one.device) if isinstance(one, Tensor) else None for one in values)
        if any(isinstance(size, torch.SymInt) for spec in specs if spec for size in spec[0]):
            return None
        # Functions of one name may be several.
        return self.graph.code, tuple(node.target for node in nodes), self.num_carry, self.num_xs, specs

    @property
    def inputs(self) -> list[fx.Node]:
        return list(self.graph.graph.find_nodes(op="placeholder"))

    @property
    def results(self) -> list[fx.Node]:
        return list(self.graph.graph.output_node().args[0])  # type: ignore[arg-type]


def check_carry(before: Any, after: Any) -> None:
    """Raise unless a carry keeps its shape and dtype, as far as those are known."""
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return
    sizes = [pair for pair in zip(before.shape, after.shape, strict=False) if all(type(size) is int for size in pair)]
    if (before.ndim, before.dtype) != (after.ndim, after.dtype) or any(old != new for old, new in sizes):
        raise UnsupportedError(
            "the carry that combine_fn returns must have the shapes and dtypes of init: "
            f"{list(before.shape)} {before.dtype} became {list(after.shape)} {after.dtype}"
        )


def is_complex(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.is_complex()


def value_of(result: fx.Node) -> Tensor:
    value = result.meta.get("example_value")
    if not isinstance(value, Tensor):
        raise UnsupportedError(f"combine_fn must return tensors, got {type(value).__name__}")
    return value


def check_open(graph: fx.Graph) -> None:
    """Raise unless a step shows its ops: what calls graphs of its own may have derivatives that these do not show."""
    for node in graph.nodes:
        if hides_ops(node):
            raise BodyError(f"{op_name(node)} in a step holds a graph of its own")
        if is_of_transform(node):
            raise BodyError("a step that uses a torch.func transform is not looked into")


def switches_gradients_on(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node) == "set_grad_enabled" and node.args == (True,)


def needed_for(graph: fx.Graph, results: Sequence[fx.Node], known: Sequence[fx.Node] = ()) -> set[fx.Node]:
    """The nodes that some results need, but for those that are known; what writes or changes how ops run is needed in any case."""
    if any(map(is_of_transform, graph.nodes)):  # what a transform sets up and takes down does not show in arguments
        return {node for node in graph.nodes if node.op != "output"}
    pending = [*results, *(node for node in graph.nodes if node.op.startswith("call_") and _has_effect(node))]
    needed: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += [] if node in known else node.all_input_nodes
    return needed


def _has_effect(node: fx.Node) -> bool:
    return bool(writes(node)) or is_barrier(node)


def part_of(step: fx.GraphModule, inputs: Sequence[fx.Node | None], results: Sequence[fx.Node]) -> fx.GraphModule:
    """What computes some results of a step from some of its values; `None` and what came before are inputs nobody reads."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(inputs):
        copied = graph.placeholder(f"unread_{number}" if node is None or node in copies else node.name)
        if node is not None and node not in copies:
            copied.meta = dict(node.meta)
            copies[node] = copied
    needed = needed_for(step.graph, results, list(copies))
    for node in step.graph.nodes:
        if node in needed and node not in copies and node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    given = set(itertools.chain(copies[node] for node in inputs if node is not None))
    made = []
    for result in results:
        copied = copies[result]
        # A state that is an input is one that the block makes all the same.
        made.append(graph.call_function(torch.clone, (copied,)) if copied in given else copied)
    graph.output(tuple(made))
    return fx.GraphModule(step, graph)
