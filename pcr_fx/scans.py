"""Loops in a graph that Dynamo captured, PyTorch's own `scan` and `pcr_fx.scan`: each becomes a module that runs it as a chain."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from pcr_fx.errors import PcrFxError
from pcr_fx.loop_step import Step
from pcr_fx.marks import Block, Framed, NotCaptured, as_number, block_of, scan_op
from pcr_fx.options import Options
from pcr_fx.reports import ChainEntry

log = logging.getLogger(__name__)


class LoopModule(nn.Module):
    """A loop, called with what the operator is given that it stands for."""

    def __init__(self, block: Block, options: Options) -> None:
        super().__init__()
        self.block, self.options = block, options

    def forward(self, *given: Any) -> tuple[Tensor, ...]:
        """The last carry, and what the steps say; in the order of the operator."""
        return self.block.framed(given).run(given, self.options)


def take_loops(graph_module: fx.GraphModule, options: Options) -> list[ChainEntry]:
    """Put modules in the place of loops, where their steps can be read; what is to be reported of each."""
    entries = []
    for number, node in enumerate(list(graph_module.graph.nodes)):
        if node.op != "call_function" or node.target not in (scan_op, torch.ops.higher_order.scan):
            continue
        block, inputs = _block(graph_module, node)
        try:
            present = [_value(one) for one in inputs]
            framed = block.framed(present)
            loop = framed.loop(options)
        except (PcrFxError, NotCaptured) as reason:
            log.warning("%s stays as it is: %s", node.name, reason)
            continue
        name = f"pcr_fx_loop_{number}"
        graph_module.add_submodule(name, LoopModule(block, options))
        with graph_module.graph.inserting_before(node):
            call = graph_module.graph.call_module(name, tuple(inputs))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph_module.graph.erase_node(node)
        entries.append(ChainEntry(loop.chain, options, node=loop.expected_node(_length(present, framed))))
    for node in list(graph_module.graph.find_nodes(op="get_attr")):
        if entries and not node.users:
            graph_module.graph.erase_node(node)
    return entries


def _block(graph_module: fx.GraphModule, node: fx.Node) -> tuple[Block, list[Any]]:
    """The block of an operator, and its inputs."""
    block: Any = graph_module.get_submodule(str(node.args[0].target))  # type: ignore[union-attr]
    if node.target is scan_op:
        return block_of(block), list(node.args[1:])
    _, init, xs, shared = node.args
    counts: Any = len(init), len(xs)  # type: ignore[arg-type]
    return Block(block, partial(_pytorchs_step, block, *counts)), [*init, *xs, *shared]  # type: ignore[misc]


def _pytorchs_step(block: fx.GraphModule, num_carry: int, num_xs: int, given: Sequence[Any]) -> Framed:
    """The step of PyTorch's own operator, which has no marks, but all that it takes and returns in order."""
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    shared = []
    for number, node in enumerate(block.graph.nodes):
        if node.op == "placeholder" and not isinstance(given[number], Tensor):
            copies[node] = as_number(given[number])
        elif node.op == "output":
            graph.output(tuple(copies[one] for one in node.args[0]))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op == "placeholder" and number >= num_carry + num_xs:
                shared.append(number)
    step = Step.of(fx.GraphModule(block, graph), num_carry, num_xs, "scan")
    before = list(range(num_carry)), list(range(num_carry, num_carry + num_xs))
    return Framed(step, *before, shared, list(range(len(step.results))), None)  # type: ignore[arg-type]


def _value(node: Any) -> Any:
    """A tensor as it was captured, or a number as it was then."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else node
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value.node.hint
    return value


def _length(present: Sequence[Any], framed: Framed) -> int:
    """How many steps there were when it was captured, as far as that is known."""
    sizes = [present[at].shape[0] for at in framed.xs if at is not None]
    size = sizes[0] if sizes else present[framed.length[0]] if isinstance(framed.length, tuple) else framed.length
    hint = size.node.hint if isinstance(size, torch.SymInt) else size
    return hint if isinstance(hint, int) and hint > 0 else 2
