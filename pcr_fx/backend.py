"""The `torch.compile` way in: `torch.compile(model, backend="deeppcr")`."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import fx
from torch._subclasses.fake_tensor import is_fake
from torch.fx.passes.split_module import split_module

from pcr_fx.body.wholes import number_of_whole, whole_of_number
from pcr_fx.compilations import Compilations, keep
from pcr_fx.frameworks import introduce
from pcr_fx.graphs.effects import is_barrier
from pcr_fx.inner import NAME, Regional, inner_backend, takes_regions, trains_regions
from pcr_fx.node import SolveNode
from pcr_fx.operands import (
    InputOperand,
    collect,
    complete,
    complex_of_parts,
    parts_of_complex,
    stack_operands,
    stack_parts,
)
from pcr_fx.options import Options
from pcr_fx.passes.inline import holds_regions, inline_regions
from pcr_fx.passes.pipeline import run_passes
from pcr_fx.passes.plan import PlannedChain, measure_chains
from pcr_fx.passes.report import warn_without_chains
from pcr_fx.progress import stage
from pcr_fx.recurrent import Recurrent
from pcr_fx.reports import RewriteReport, merge_reports
from pcr_fx.scans import CountedLoop, LoopModule, take_loops
from pcr_fx.switches import is_disabled

log = logging.getLogger(__name__)

_latest = Compilations()


def deeppcr(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Find the chains of a graph that Dynamo captured, put solve nodes in their place, compile the rest.

    Args:
        graph_module: the captured graph.
        example_inputs: as Dynamo passes them. Chains are measured on those that are real tensors.
        mode: `torch.compile`'s `mode`, handed on to the inner backend.
        options: the fields of `pcr_fx.Options`.
    """
    settings = Options.of(options)
    compile_rest = inner_backend(settings, mode)
    with stage(f"finding chains in a graph of {len(graph_module.graph.nodes)} nodes"):
        report, native = rewrite_captured(graph_module, example_inputs, settings)
    _latest.add(report)
    _advise(report, _latest.lengths)
    if takes_regions(settings) and not report.is_off:
        compile_rest = Regional(compile_rest, report, trains_regions(settings))
    with stage("having the inner backend compile the rest"):
        if native or _has_loops_apart(graph_module):
            compiled = compile_around(graph_module, compile_rest)
        else:
            nodes = [module for module in graph_module.modules() if isinstance(module, SolveNode)]
            compiled = _holding(nodes, compile_rest(graph_module, example_inputs))
    if not report.chains and not report.regions:
        # A training step is several graphs: there need not be a chain in that of the optimiser.
        warn_without_chains(merge_reports(_latest.reports))
    return compiled


def _has_loops_apart(graph_module: fx.GraphModule) -> bool:
    """Whether loops are to be called apart from the rest; how often one that counts steps is only known where it is called."""
    modules = list(graph_module.children())
    if any(isinstance(module, CountedLoop) for module in modules):
        return True
    loops, others = (any(isinstance(module, kind) for module in modules) for kind in (LoopModule, SolveNode))
    return loops and not others and not any(map(is_barrier, graph_module.graph.nodes))


# The nodes of callables that take no attributes.
_held: list[list[SolveNode]] = []


def _holding(nodes: list[SolveNode], run: Callable[..., Any]) -> Callable[..., Any]:
    """What a compiler made, which names plans and records that live as long as their nodes."""
    if nodes:
        try:
            run._pcr_fx_nodes = nodes  # type: ignore[attr-defined]
        except AttributeError:
            _held.append(nodes)
    return run


def rewrite_captured(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> tuple[RewriteReport, bool]:
    """Rewrite a graph captured by Dynamo in place. One without a chain keeps its marked regions.

    Returns:
        The report, and whether chains are to be called apart from the rest: all run as native kernels, or some are of recurrent
        networks, which choose at run time what they run by.
    """
    if is_disabled():
        return RewriteReport(is_off=True), False
    way_in = _CapturedByDynamo(graph_module, example_inputs, options)
    rewritten = run_passes(way_in, options)
    modules = {**rewritten.nodes, **rewritten.recurrent}
    if modules:
        for name, module in modules.items():
            graph_module.add_submodule(name, module)
        graph_module.graph = rewritten.graph
    report = rewritten.report
    chains, near_misses = take_loops(graph_module, options)
    report.chains += chains
    report.rejected += near_misses
    graph_module.recompile()
    splits = torch._dynamo.utils.get_optimize_ddp_mode() == "ddp_optimizer"
    if splits and torch.nn.parallel.DistributedDataParallel._get_active_ddp_module() is not None:
        report.notes.append(
            "DistributedDataParallel splits the graph into buckets before this backend sees it, which cuts chains; "
            "torch._dynamo.config.optimize_ddp = False keeps it whole"
        )
    return report, way_in.is_native or bool(rewritten.recurrent)


# Lengths of one loop from which on there is advice.
_MANY_LENGTHS = 3


def _advise(report: RewriteReport, known: dict[Any, set[int]]) -> None:
    """Say of a loop that is compiled for ever new lengths that there is a way that compiles once.

    Stages of a network are alike but for their lengths, layers have parameters of their own, and what `scan` runs has a family of
    all lengths: these are no such loops.

    Args:
        known: the lengths that were compiled for one model, by what the blocks compute.
    """
    entries = [one for one in report.chains if not one.parameters and (one.node is None or one.node.family is None)]
    chains = [entry.chain for entry in entries]
    keys = [(chain.body.code, tuple(node.target for node in chain.body.graph.nodes)) for chain in chains]
    for chain, key in zip(chains, keys, strict=True):
        if keys.count(key) > 1:
            continue
        lengths = known.setdefault(key, set())
        before = len(lengths)
        lengths.add(chain.length)
        if len(lengths) < _MANY_LENGTHS:
            continue
        where = chain.origin.source or chain.origin.modules or "a loop"
        note = f"{where}: this loop changes its length, and is compiled for each; pcr_fx.scan compiles once for all"
        report.notes.append(note)
        if before < _MANY_LENGTHS:
            log.warning("%s", note)


class _CapturedByDynamo:
    """A graph that Dynamo captured, on its way through the passes.

    Attributes:
        root: its module.
        is_native: whether all its chains run as native kernels that can be called apart from the rest.
    """

    guards_sizes: ClassVar[bool] = True

    def __init__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> None:
        self.root, self.example_inputs, self.options = graph_module, example_inputs, options
        self.is_native = False
        self.values: dict[fx.Node, torch.Tensor] = {}
        self.read_in_place = 0

    def capture(self) -> fx.Graph:
        graph = self.root.graph
        if holds_regions(graph) or any(map(is_barrier, graph.nodes)):
            graph = inline_regions(self.root)  # what is no chain keeps its regions, and what is switched within them
        self.values = _real_inputs(graph.find_nodes(op="placeholder"), self.example_inputs)
        return graph

    def place(self, graph: fx.Graph, planned: Sequence[PlannedChain]) -> list[PlannedChain]:
        needs_gradient = torch.is_grad_enabled()
        placed = [
            item if item.left_alone(needs_gradient) else replace(item, node=self._node(item))
            for item in measure_chains(planned, self.values)
        ]
        choices = [item.choice for item in placed if item.node is not None]
        native = all(choice is not None and choice.is_in_place(needs_gradient) for choice in choices)
        # What changes how ops run may not be cut off from those that it changes.
        self.is_native = native and bool(choices) and not any(map(is_barrier, graph.nodes))
        return placed

    def _node(self, item: PlannedChain) -> SolveNode:
        return SolveNode(item.found.chain, self.options, item.plan, item.found.leaving)

    def calls_modules(self, graph: fx.Graph) -> bool:
        return not any(map(is_barrier, graph.nodes))  # see `place`

    def stack(self, new: fx.Graph, operand: Sequence[fx.Node], copies: dict[fx.Node, fx.Node]) -> fx.Node:
        """Kernels are given the inputs of the graph where they lie."""
        tensors = [copies[node] for node in operand]
        if not self.is_native:
            return new.call_function(stack_operands, (tensors,))
        name = f"pcr_fx_operand_{self.read_in_place}"
        self.read_in_place += 1
        self.root.add_submodule(name, InputOperand())
        return new.call_module(name, (tensors,))


def _real_inputs(placeholders: Iterable[fx.Node], example_inputs: Sequence[Any]) -> dict[fx.Node, torch.Tensor]:
    """The inputs that hold numbers: some callers only give shapes."""
    pairs = zip(placeholders, example_inputs, strict=False)
    return {node: value for node, value in pairs if isinstance(value, torch.Tensor) and not is_fake(value)}


# Modules that are called as they are, and not compiled.
_CALLED = (SolveNode, InputOperand, Recurrent, LoopModule)
_CALLED_FUNCTIONS = (
    *(stack_parts, collect, complete, parts_of_complex, complex_of_parts),
    *(number_of_whole, whole_of_number),
)


def compile_around(graph_module: fx.GraphModule, compile_rest: Callable[..., Any]) -> Callable[..., Any]:
    """The graph with its solve nodes called as they are, and what is around them compiled, part by part.

    A compiler has nothing to add to a native kernel, and checks each of thousands of inputs at each call.
    """
    modules = {name for name, module in graph_module.named_children() if isinstance(module, _CALLED)}

    def is_called(node: fx.Node) -> bool:
        return node.target in _CALLED_FUNCTIONS or (node.op == "call_module" and node.target in modules)

    part, was_called, parts = 0, None, dict[fx.Node, int]()
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        # What a solve node returned is unpacked beside it.
        unpacks = node.target is operator.getitem and parts.get(node.args[0], -1) == part and bool(was_called)
        called = is_called(node) or unpacks
        part += was_called is not None and called != was_called
        was_called = called
        parts[node] = part
    if part == 0:
        return graph_module.forward
    # In the order that they have: a part that only writes has nothing that the others depend on.
    split = split_module(graph_module, None, parts.__getitem__, keep_original_order=True)  # type: ignore[arg-type]
    for name, module in list(split.named_children()):
        if not any(is_called(node) for node in module.graph.nodes):
            inputs = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
            is_single = _return_tuple(module)
            split.add_submodule(name, _Compiled(compile_rest(module, inputs), is_single))
    return split.forward


def _return_tuple(module: Any) -> bool:
    """Have a part of a graph return a tuple, as backends take for granted of what Dynamo gives them; whether it did not."""
    output = module.graph.output_node()
    is_single = isinstance(output.args[0], fx.Node)
    if is_single:
        output.args = ((output.args[0],),)
        module.recompile()
    return is_single


class _Compiled(torch.nn.Module):
    """What a backend returned, as a module; of one that `is_single` its only result."""

    def __init__(self, run: Callable[..., Any], is_single: bool) -> None:
        super().__init__()
        self.run, self.is_single = run, is_single

    def forward(self, *inputs: Any) -> Any:
        results = self.run(*inputs)
        return results[0] if self.is_single else results


def last_report() -> RewriteReport | None:
    """The report of what was compiled last; `None` where nothing was."""
    return _latest.merged()


def register() -> None:
    """Make the backend known where the package is not installed, and so has no entry point; have Dynamo say what it compiles."""
    keep(deeppcr, _latest)
    introduce(NAME)
    if NAME not in torch._dynamo.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(deeppcr, name=NAME)
