"""The `torch.compile` way in: `torch.compile(model, backend="deeppcr")`."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import is_fake
from torch.fx.passes.split_module import split_module

from pcr_fx.errors import OptionError
from pcr_fx.graphs.attributes import attributes_of
from pcr_fx.node import SolveNode
from pcr_fx.operands import InputColumn, stack_operands, stack_parts
from pcr_fx.options import Options
from pcr_fx.passes.detect import find_chains
from pcr_fx.passes.inline import holds_regions, inline_regions
from pcr_fx.passes.normalise import normalise_graph
from pcr_fx.passes.plan import measure_chains, plan_chains
from pcr_fx.passes.rewrite import is_barrier, rewrite_chains
from pcr_fx.reports import RewriteReport, build_report, merge_reports

NAME = "deeppcr"
_reports: list[RewriteReport] = []


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
    compile_rest = _inner_backend(settings, mode)
    report, native = rewrite_captured(graph_module, example_inputs, settings)
    _remember(report)
    if native:
        return compile_around(graph_module, compile_rest)
    return compile_rest(graph_module, example_inputs)


def rewrite_captured(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> tuple[RewriteReport, bool]:
    """Rewrite a graph captured by Dynamo in place. One without a chain keeps its marked regions.

    Returns:
        The report, and whether all chains run as native kernels that can be called apart from the rest.
    """
    graph = inline_regions(graph_module) if holds_regions(graph_module.graph) else graph_module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    normalise_graph(graph)
    attributes = attributes_of(graph_module, graph)
    planned, rejected = plan_chains(graph, find_chains(graph, attributes, options.min_length), attributes, options)
    needs_gradient = torch.is_grad_enabled()
    planned = measure_chains(planned, _real_inputs(placeholders, example_inputs))
    active = [item for item in planned if not item.left_alone(needs_gradient)]
    native = all(item.choice is not None and item.choice.is_native(needs_gradient) for item in active)
    # What changes how ops run may not be cut off from those that it changes.
    native = native and bool(active) and not any(map(is_barrier, graph.nodes))
    nodes = [SolveNode(item.found.chain, options, item.plan, item.found.taps) for item in active]
    names = []
    for index, node in enumerate(nodes):
        names.append(f"pcr_fx_solve_{index}")
        graph_module.add_submodule(names[-1], node)
    if nodes:
        stack = _Columns(graph_module) if native else _stack
        graph_module.graph = rewrite_chains(graph, [item.found for item in active], names, stack)
    report = build_report(graph, planned, dict(zip(map(id, active), nodes, strict=True)), rejected, options)
    graph_module.recompile()
    if torch.nn.parallel.DistributedDataParallel._get_active_ddp_module() is not None:
        report.notes.append(
            "DistributedDataParallel splits the graph into buckets before this backend sees it, which cuts chains; "
            "torch._dynamo.config.optimize_ddp = False keeps it whole"
        )
    return report, native


def _real_inputs(placeholders: Sequence[fx.Node], example_inputs: Sequence[Any]) -> dict[fx.Node, torch.Tensor]:
    """The inputs that hold numbers: some callers only give shapes."""
    pairs = zip(placeholders, example_inputs, strict=False)
    return {node: value for node, value in pairs if isinstance(value, torch.Tensor) and not is_fake(value)}


class _Columns:
    """Emits what gives kernels the inputs of the graph where they lie."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.count = 0

    def __call__(self, new: fx.Graph, column: Sequence[fx.Node], copies: dict[fx.Node, fx.Node]) -> fx.Node:
        name = f"pcr_fx_column_{self.count}"
        self.count += 1
        self.graph_module.add_submodule(name, InputColumn())
        return new.call_module(name, ([copies[node] for node in column],))


def compile_around(graph_module: fx.GraphModule, compile_rest: Callable[..., Any]) -> Callable[..., Any]:
    """The graph with its solve nodes called as they are, and what is around them compiled, part by part.

    A compiler has nothing to add to a native kernel, and checks each of thousands of inputs at each call.
    """
    modules = {name for name, module in graph_module.named_children() if isinstance(module, SolveNode | InputColumn)}

    def is_called(node: fx.Node) -> bool:
        return node.target is stack_parts or (node.op == "call_module" and node.target in modules)

    part, was_own, parts = 0, None, dict[fx.Node, int]()
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        is_own = is_called(node)
        # What a solve node returned is unpacked beside it.
        is_own = is_own or (node.target is operator.getitem and parts.get(node.args[0], -1) == part and bool(was_own))
        part += was_own is not None and is_own != was_own
        was_own = is_own
        parts[node] = part
    if part == 0:
        return graph_module.forward
    split = split_module(graph_module, None, parts.__getitem__)  # type: ignore[arg-type]
    for name, module in list(split.named_children()):
        if not any(is_called(node) for node in module.graph.nodes):
            inputs = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
            split.add_submodule(name, _Compiled(compile_rest(module, inputs)))
    return split.forward


class _Compiled(torch.nn.Module):
    """What a backend returned, as a module."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *inputs: Any) -> Any:
        return self.run(*inputs)


def _stack(new: fx.Graph, column: Sequence[fx.Node], copies: dict[fx.Node, fx.Node]) -> fx.Node:
    return new.call_function(stack_operands, ([copies[node] for node in column],))


def _inner_backend(options: Options, mode: str | None) -> Callable[..., Any]:
    inner = options.inner_backend
    if not isinstance(inner, str):
        return inner
    known = [name for name in torch._dynamo.list_backends(exclude_tags=()) if name != NAME]
    if inner not in known:
        raise OptionError(f"option inner_backend={inner!r} is not allowed; it must be one of {', '.join(known)}")
    compile_rest = torch._dynamo.lookup_backend(inner)
    if mode is None or mode == "default":
        return compile_rest
    if inner != "inductor":
        raise OptionError(f"mode={mode!r} is for the inner backend 'inductor', and this one is {inner!r}")
    patches = torch._inductor.list_mode_options(mode)
    return lambda module, inputs: compile_rest(module, inputs, config_patches=patches)  # type: ignore[call-arg]


def _remember(report: RewriteReport) -> None:
    """Keep the report for `pcr_fx.report()`: with those before it where this graph continues a broken one."""
    if not _continues_a_graph():
        _reports.clear()
    _reports.append(report)


def _continues_a_graph() -> bool:
    """Whether Dynamo compiles the rest of a function behind a graph break."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_locals.get("code") if frame.f_code.co_filename.endswith("convert_frame.py") else None
        if isinstance(code, CodeType):
            return code.co_name.startswith("torch_dynamo_resume_in")
        frame = frame.f_back
    return False


def last_report() -> RewriteReport | None:
    """The report of the last compilation."""
    return merge_reports(_reports) if _reports else None


def register() -> None:
    """Make the backend known where the package is not installed, and so has no entry point."""
    if NAME not in torch._dynamo.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(deeppcr, name=NAME)
