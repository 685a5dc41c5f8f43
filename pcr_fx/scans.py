"""Loops in a graph that Dynamo captured, PyTorch's own and `pcr_fx.scan`: each becomes a module that runs it as a chain."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from pcr_fx.chain import NearMiss
from pcr_fx.counters import CountedStep, find_counted_step
from pcr_fx.errors import PcrFxError, UnsupportedError
from pcr_fx.graphs.effects import is_barrier
from pcr_fx.loop_step import Step
from pcr_fx.marks import Block, Framed, NotCaptured, as_number, block_of, scan_op
from pcr_fx.options import Options
from pcr_fx.passes.describe import describe_source
from pcr_fx.reports import ChainEntry

log = logging.getLogger(__name__)

_SCAN, _WHILE_LOOP = torch.ops.higher_order.scan, torch.ops.higher_order.while_loop


class LoopModule(nn.Module):
    """A loop, called with what the operator is given that it stands for.

    Attributes:
        followers: what tells of its latest call.
    """

    def __init__(self, block: Block, options: Options) -> None:
        super().__init__()
        self.block, self.options = block, options
        self.followers: list[ChainEntry] = []

    def forward(self, *given: Any) -> tuple[Any, ...]:
        """The last carry, and what the steps say; in the order of the operator."""
        framed = self.block.framed(given)
        results, node = framed.run(given, self.options), framed.loop(self.options).node
        if node is not None:
            for follower in self.followers:
                follower.chain, follower.node = node.chain, node
        return results

    def framed(self, given: Sequence[Any]) -> tuple[Framed, int]:
        """The step, and how many there are, as far as that is known of such tensors."""
        framed = self.block.framed(given)
        sizes = [given[at].shape[0] for at in framed.xs if at is not None]
        size = sizes[0] if sizes else given[framed.length[0]] if isinstance(framed.length, tuple) else framed.length
        hint = size.node.hint if isinstance(size, torch.SymInt) else size
        return framed, hint if isinstance(hint, int) and hint > 0 else 2


class CountedLoop(LoopModule):
    """A `while_loop` that counts, called with what it hands on and what its steps are given whole.

    Args:
        block: its step.
        num_carry: how much it hands on, with its counter.
        written: the loop as it is written: its condition and its body.
    """

    def __init__(
        self, block: Block, options: Options, step: CountedStep, num_carry: int, written: Sequence[fx.GraphModule]
    ) -> None:
        super().__init__(block, options)
        self.step, self.num_carry, self.written = step, num_carry, tuple(written)

    def forward(self, *given: Any) -> tuple[Any, ...]:
        counter, carry = self.step.counter, given[: self.num_carry]
        steps = counter.steps(given)
        if steps is not None and not steps:
            return tuple(map(_fresh, carry))
        as_scan = None if steps is None else self._as_scan(given, steps)
        if steps is None or as_scan is None:
            return tuple(map(_fresh, _WHILE_LOOP(*self.written, carry, given[self.num_carry :])))
        results, last = super().forward(*as_scan), counter.after(steps)
        final = last if counter.dtype is None else torch.full_like(carry[counter.place], last)
        return (*results[: counter.place], final, *results[counter.place :])

    def framed(self, given: Sequence[Any]) -> tuple[Framed, int]:
        bound = self.step.counter.bound
        count = given[bound[0]] if isinstance(bound, tuple) else bound
        length = max(abs(count), 2) if isinstance(count, int) else 2
        return self.block.framed(self._as_scan(given, None)), length

    def _as_scan(self, given: Sequence[Any], steps: range | None) -> Any:
        """What a scan of this step is given; `None` where a row is missing.

        Args:
            steps: the counter in each; `None` for what looks no further than at numbers among what is given.
        """
        counter, carry = self.step.counter, list(given[: self.num_carry])
        del carry[counter.place]
        own: list[Any] = [None] * (1 + len(self.step.rows))
        if steps is not None:
            bounds = steps.start, counter.after(steps), steps.step
            numbers = torch.arange(*bounds, dtype=counter.dtype or torch.int64, device=carry[0].device)
            own = [numbers, *(rows.of(given[rows.source], steps) for rows in self.step.rows)]
            if any(one is None for one in own):
                return None
        return [*carry, *own, *given[self.num_carry :]]


def _fresh(value: Any) -> Any:
    """A tensor in memory of its own, as what is compiled behind a loop takes for granted."""
    return value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value


def take_loops(graph_module: fx.GraphModule, options: Options) -> tuple[list[ChainEntry], list[NearMiss]]:
    """Put modules in the place of loops, where their steps can be read; what is to be reported of each, and of the others."""
    entries, near_misses = [], []
    for number, node in enumerate(list(graph_module.graph.nodes)):
        if node.op != "call_function" or node.target not in (scan_op, _SCAN, _WHILE_LOOP):
            continue
        try:
            loop, inputs = _loop(graph_module, node, options)
            framed, length = loop.framed([_value(one) for one in inputs])
            found = framed.loop(options)
        except (PcrFxError, NotCaptured) as reason:
            log.warning("%s stays as it is: %s", node.name, reason)
            why = f"runs as it is written: {reason}"
            near_misses.append(NearMiss(f"{node.name} (a loop)", why, 0, describe_source(node)))
            continue
        name = f"pcr_fx_loop_{number}"
        graph_module.add_submodule(name, loop)
        with graph_module.graph.inserting_before(node):
            call = graph_module.graph.call_module(name, tuple(inputs))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph_module.graph.erase_node(node)
        if node.target is _WHILE_LOOP:
            _without_count(call)
        loop.followers.append(ChainEntry(found.chain, options, node=found.expected_node(length)))
        entries += loop.followers
    for node in list(graph_module.graph.find_nodes(op="get_attr")):
        if entries and not node.users:
            graph_module.graph.erase_node(node)
    return entries, near_misses


def _without_count(call: fx.Node) -> None:
    """Have what a `while_loop` returns be no part any more of memory whose size is the number of steps."""
    for node in (call, *call.users):
        value = node.meta.get("example_value")
        is_whole = node is call
        renewed = [
            torch.empty_like(one, memory_format=torch.contiguous_format).requires_grad_(one.requires_grad)
            if isinstance(one, Tensor)
            else one
            for one in (value if is_whole else (value,))
        ]
        node.meta["example_value"] = tuple(renewed) if is_whole else renewed[0]


def _loop(graph_module: fx.GraphModule, node: fx.Node, options: Options) -> tuple[LoopModule, list[Any]]:
    """What runs the loop that an operator is, and the operator's inputs."""
    args: Any = node.args
    block: Any = graph_module.get_submodule(str(args[0].target))
    if node.target is scan_op:
        return LoopModule(block_of(block), options), list(args[1:])
    if node.target is _WHILE_LOOP:
        return _counted_loop(graph_module, node, options), [*args[2], *args[3]]
    _, init, xs, shared = args
    find = partial(_pytorchs_step, block, len(init), len(xs), source=describe_source(node))
    return LoopModule(Block(block, find), options), [*init, *xs, *shared]


def _counted_loop(graph_module: fx.GraphModule, node: fx.Node, options: Options) -> CountedLoop:
    args: Any = node.args
    condition, body = written = [graph_module.get_submodule(str(one.target)) for one in args[:2]]
    num_carry = len(args[2])
    if any(map(is_barrier, graph_module.graph.nodes)):  # how often it steps is only known to what runs it
        raise UnsupportedError("what changes how ops run may not be cut off from those that it changes")
    step = find_counted_step(condition, body, num_carry)  # type: ignore[arg-type]
    find = partial(
        _pytorchs_step, step.graph, num_carry - 1, 1 + len(step.rows), name="while_loop", source=describe_source(node)
    )
    return CountedLoop(Block(step.graph, find), options, step, num_carry, written)  # type: ignore[arg-type]


def _pytorchs_step(
    block: fx.GraphModule, num_carry: int, num_xs: int, given: Sequence[Any], *, name: str = "scan", source: str = ""
) -> Framed:
    """The step of one of PyTorch's own operators, which has no marks, but all that it takes and returns in order."""
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    shared = []
    for number, node in enumerate(block.graph.nodes):
        if node.op == "placeholder" and not isinstance(node.meta.get("example_value"), Tensor):
            copies[node] = as_number(given[number])
        elif node.op == "output":
            graph.output(tuple(copies[one] for one in node.args[0]))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op == "placeholder" and number >= num_carry + num_xs:
                shared.append(number)
    step = Step.of(fx.GraphModule(block, graph), num_carry, num_xs, name, source)
    before = list(range(num_carry)), list(range(num_carry, num_carry + num_xs))
    return Framed(step, *before, shared, list(range(len(step.results))), None)  # type: ignore[arg-type]


def _value(node: Any) -> Any:
    """A tensor as it was captured, or a number as it was then."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else node
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value.node.hint
    return value
