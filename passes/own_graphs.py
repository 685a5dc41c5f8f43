"""The ops of functions with derivatives of their own that a trace recorded by name alone: `torch.autograd.Function`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pcr_fx.body.isolation import isolated
from pcr_fx.graphs.effects import does_more
from pcr_fx.graphs.parts import OwnFunction, content_of


@dataclass(frozen=True, eq=False)
class OwnGraphs:
    """Forward and backward of a function, as `own_derivative` takes them.

    Attributes:
        is_single: whether it returns a tensor, and no tuple.
    """

    forward: fx.Graph
    backward: fx.Graph
    fixed: Sequence[int]
    is_single: bool = False


# Sizes that functions are read for beside those at hand: what they compute may not hang on any.
_OTHER_SIZES: tuple[Callable[[int], int], ...] = (lambda size: 1, lambda size: size + 10**6)


def read_function(function: OwnFunction, examples: Sequence[Tensor]) -> OwnGraphs | None:
    """Its graphs for the numbers that it is called with; `None` where they are others for tensors of other sizes.

    Args:
        examples: what it is given; their values are not looked at.
    """
    found, contents = _read_with(function, examples)
    for other in _OTHER_SIZES:
        if found is not None and _read_with(function, examples, other)[1] != contents:
            return None
    return found


@isolated
def _read_with(
    function: OwnFunction, examples: Sequence[Tensor], size: Callable[[int], int] = int
) -> tuple[OwnGraphs | None, Hashable]:
    """Its graphs for sizes that are made of those of the examples, and what they compute."""
    call = function.call()

    def joint(*given: Any) -> tuple[Any, Any]:
        """From what the function is given: its forward may keep what it likes, in containers of its own."""
        inputs = given[count:]
        results = call.run(*inputs)
        return results[:count], call.pull(given, call.saved(inputs, results))

    try:
        with FakeTensorMode(), torch.no_grad():
            inputs = [torch.empty([*map(size, one.shape)], dtype=one.dtype, device=one.device) for one in examples]
            outputs = call.run(*inputs)[: call.count]
            count = len(outputs)
            graph = make_fx(joint, pre_dispatch=True)(*map(torch.empty_like, outputs), *inputs).graph
        contents = content_of(graph)
        hash(contents)
        return _split(graph, count, call), contents
    except Exception:  # whatever the author's code does with such tensors
        return None, None


def _split(graph: fx.Graph, count: int, call: Any) -> OwnGraphs:
    """Forward and backward of what computes both from cotangents of `count` outputs, and what the function is given.

    Raises:
        ValueError: it does more than compute, or holds tensors of its own.
    """
    for node in graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and does_more(node)):
            raise ValueError(f"{node} is more than an op")
        node.meta["example_value"] = node.meta.get("val")
    outputs, cotangents = graph.output_node().args[0]  # type: ignore[misc, str-unpack]
    inputs = graph.find_nodes(op="placeholder")[count:]
    forward, backward = (_alone(graph, result) for result in ((outputs, tuple(inputs)), cotangents))
    for node in forward.find_nodes(op="placeholder")[:count]:
        forward.erase_node(node)
    return OwnGraphs(forward, backward, tuple(call.fixed), call.is_single)


def _alone(graph: fx.Graph, result: Any) -> fx.Graph:
    """What computes a part of what a graph does."""
    alone, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    alone.graph_copy(graph, copies)
    alone.output(fx.node.map_arg(result, copies.__getitem__))
    alone.eliminate_dead_code()
    return alone
