"""A model as it was traced and rewritten once: the graph that `transform` runs, and which calls it is for."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from pcr_fx.body.isolation import apart
from pcr_fx.carried import Carrier
from pcr_fx.graphs.attributes import holder_of
from pcr_fx.graphs.hooks import HookOp, TensorHook
from pcr_fx.node import SolveNode
from pcr_fx.operands import Attributes, Source, StackedAttributes, stack_operands
from pcr_fx.options import Options
from pcr_fx.passes.capture import Captured, capture_model
from pcr_fx.passes.facts import Facts
from pcr_fx.passes.pipeline import run_passes
from pcr_fx.passes.plan import PlannedChain
from pcr_fx.rehearsal import Rehearsal
from pcr_fx.reports import RewriteReport
from pcr_fx.switches import OFF
from pcr_fx.watched import Changes


@dataclass(frozen=True, eq=False)
class Variant:
    """One traced and rewritten graph.

    Attributes:
        switches: whether it switches gradients or autocast, and would leave them so if an op raised an error.
    """

    captured: Captured
    run: fx.GraphModule
    report: RewriteReport
    rehearsal: Rehearsal | None
    switches: bool = False

    def holds(self) -> bool:
        """Whether the model is still what was traced, or it runs as it was written."""
        return self.captured.model_facts.hold() or (self.rehearsal is not None and self.rehearsal.binds)

    def holds_for(self, arguments: dict[str, Any]) -> bool:
        """Whether that is so, and it was traced for such arguments."""
        if self.captured.model_facts.hold() and self.captured.holds_for(arguments):
            return True
        return self.rehearsal is not None and self.rehearsal.binds


def as_written(model: nn.Module, changes: Changes) -> Variant:
    """What leaves every call to the model, which is not even read."""
    captured = Captured.of_nothing(model, changes)
    everything = Rehearsal(captured.model_facts, [], [])
    everything.leave_alone(OFF)
    return Variant(captured, fx.GraphModule({}, captured.graph), RewriteReport(is_off=True), everything)


def rewrite_model(
    model: nn.Module, example_inputs: Any, options: Options, changes: Changes
) -> tuple[Captured, fx.GraphModule, RewriteReport]:
    """`model` as it was captured, rewritten, and what is to be said of that; its attributes are read at each call."""
    way_in = _TracedModel(model, example_inputs, options, changes)
    rewritten = run_passes(way_in, options)
    attributes = _fetch_attributes(rewritten.graph, model, way_in.stacked)
    run = fx.GraphModule({**rewritten.nodes, **rewritten.recurrent, "attributes": attributes}, rewritten.graph)
    rewritten.report.notes += way_in.captured.notes
    kept = sum("recompute" in node.meta for node in rewritten.graph.nodes)
    if kept:
        rewritten.report.notes.append(
            f"{kept} ops of checkpoints lie in no chain, and keep their results for the backward"
        )
    return way_in.captured, run, rewritten.report


@apart
def may_be_exported(variant: Variant, arguments: dict[str, Any]) -> bool:
    """Whether a graph computes the forward for these arguments, of whatever size those dimensions are that have none yet."""
    captured = variant.captured
    if variant.rehearsal is not None or variant.switches or captured.model_facts.changed():
        return False
    sizes = [size for one in pytree.tree_leaves(arguments) if isinstance(one, Tensor) for size in one.shape]
    if any(isinstance(size, torch.SymInt) and size.node.hint is None for size in sizes):
        return False
    stand_ins = (pytree.tree_map_only(Tensor, partial(_stand_in, more=more), arguments) for more in (0, 1))
    return all(map(captured.holds_for, stand_ins))


def _stand_in(tensor: Tensor, more: int) -> Tensor:
    """A tensor with numbers in place of symbols for sizes: the expected ones, or some more."""
    sizes = [size.node.hint + more if isinstance(size, torch.SymInt) else size for size in tensor.shape]
    with FakeTensorMode():
        made = torch.empty(sizes, dtype=tensor.dtype, device=tensor.device)
    return made.requires_grad_(tensor.requires_grad)


def carried(variant: Variant) -> fx.GraphModule:
    """The graph with operators in place of its solve nodes, which exported programs hold."""
    return fx.GraphModule(
        {name: Carrier(one) if isinstance(one, SolveNode) else one for name, one in variant.run.named_children()},
        variant.run.graph,
    )


def rehearse(facts: Facts, graph: fx.Graph, report: RewriteReport) -> Rehearsal | None:
    """How to find out whether a graph follows the hooks that it runs, if there are any; or that no call can be like its trace."""
    if not facts.hold():
        never = Rehearsal(facts, [], report.notes)
        never.blame(f"each call would be traced anew, for {facts.changed()}")
        return never
    ops = [node.target for node in graph.nodes if isinstance(node.target, HookOp)]
    hooked = {op.path: op.module for op in ops if not isinstance(op, TensorHook)}
    if any(isinstance(op, TensorHook) for op in ops):
        report.notes.append(
            "hooks of tensors that the forward registers run at each call; no chain reaches across them"
        )
    if not hooked:
        return None
    names = ", ".join(list(hooked)[:3]) + (f" and {len(hooked) - 3} more" if len(hooked) > 3 else "")
    words = f"hooks run at each call of {names}"
    reason = "" if report.chains else f"{words}, and leave no chain between them"
    report.notes.append(
        f"{reason}: the model runs as it was written" if reason else f"{words}; no chain reaches across them"
    )
    rehearsal = Rehearsal(facts, list(hooked.values()), report.notes, bool(reason), reason)
    for op in ops:
        op.watch = rehearsal
    return rehearsal


class _TracedModel:
    """A model that is traced, on its way through the passes.

    Attributes:
        root: the model.
        values: none, since later calls have other inputs.
        captured: its graph.
        stacked: the per-block operands that are attributes of it, by the names that the rewritten graph reads them by.
    """

    guards_sizes: ClassVar[bool] = False  # but for those that the forward asked for
    captured: Captured

    def __init__(self, model: nn.Module, example_inputs: Any, options: Options, changes: Changes) -> None:
        self.root, self.example_inputs, self.options, self.changes = model, example_inputs, options, changes
        self.values: dict[fx.Node, Any] = {}
        self.stacked: dict[str, StackedAttributes] = {}

    def capture(self) -> fx.Graph:
        self.captured = capture_model(self.root, self.example_inputs, self.changes)
        return self.captured.graph

    def place(self, graph: fx.Graph, planned: Sequence[PlannedChain]) -> list[PlannedChain]:
        """All become nodes, since a later call may have another batch size: what to do then, each decides by itself."""
        return [replace(item, node=self._node(item)) for item in planned]

    def _node(self, item: PlannedChain) -> SolveNode:
        node = SolveNode(item.found.chain, self.options, leaving=item.found.leaving)
        if item.plan is not None:
            node.learn(item.plan)
        return node

    def calls_modules(self, graph: fx.Graph) -> bool:
        return True

    def stack(self, new: fx.Graph, operand: Sequence[fx.Node], copies: dict[fx.Node, fx.Node]) -> fx.Node:
        if any(node.op != "get_attr" for node in operand):
            return new.call_function(stack_operands, ([copies[node] for node in operand],))
        name = f"operand {len(self.stacked)}"  # no attribute of the model can have this name
        sources = [_source(self.root, str(node.target)) for node in operand]
        self.stacked[name] = StackedAttributes(sources, self.changes)
        return new.get_attr(name)


def _fetch_attributes(graph: fx.Graph, model: nn.Module, stacked: dict[str, StackedAttributes]) -> Attributes:
    """Read all attributes of the graph at one place, by name and not by path: a path of four names costs 1 us.

    Behind what runs hooks they are read anew: hooks may put others there for the time of a forward, as sharding does.
    """
    names: list[str] = []
    for first, found in _between_hooks(graph):
        with graph.inserting_before(first):
            fetched = graph.call_module("attributes", (len(names), len(names) + len(found)))
            for index, node in enumerate(found):
                value = graph.call_function(operator.getitem, (fetched, index))
                node.replace_all_uses_with(value)
        for node in found:
            graph.erase_node(node)
        names += [str(node.target) for node in found]
    return Attributes([stacked[name] if name in stacked else _source(model, name) for name in names])


def _between_hooks(graph: fx.Graph) -> list[tuple[fx.Node, list[fx.Node]]]:
    """The attributes that are read before, between and behind hooks, as far as any are; with the op to read them before."""
    groups: list[tuple[fx.Node, list[fx.Node]]] = []
    first: fx.Node | None = None
    found: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "get_attr":
            found.append(node)
        elif node.op != "placeholder":
            first = first or node
        if isinstance(node.target, HookOp) or node.op == "output":
            if found:
                assert first is not None
                groups.append((first, found))
            first, found = None, []
    return groups


def _source(model: nn.Module, path: str) -> Source:
    """Where an attribute is kept."""
    holder, name = holder_of(model, path)
    assert isinstance(holder, dict), f"the tracer named an attribute that does not exist: {path}"
    return Source(path, holder, name)
