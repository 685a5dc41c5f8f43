"""The explicit way in: a module with the same parameters whose chains run through solve nodes."""

from __future__ import annotations

import contextlib
import copy
import inspect
import operator
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from pcr_fx.errors import UnsupportedError
from pcr_fx.graphs.attributes import holder_of
from pcr_fx.node import SolveNode
from pcr_fx.operands import Attributes, Source, StackedAttributes, Watched, stack_operands
from pcr_fx.options import Options
from pcr_fx.packing import CONTAINER, Pack, pack_operands
from pcr_fx.passes.capture import Captured, bind_to, capture_model
from pcr_fx.passes.pipeline import run_passes
from pcr_fx.passes.plan import PlannedChain
from pcr_fx.reports import RewriteReport

# How many graphs a module keeps, of those used last: one for each mode, and for each of what the forward asked of its
# arguments. Whoever needs more in turn pays for tracing each anew.
_GRAPHS_KEPT = 32


def transform(
    model: nn.Module, example_inputs: Any = None, options: Any = None, *, pack_parameters: bool = False
) -> TransformedModule:
    """A module that computes what `model` computes, its chains solved as whole systems.

    Args:
        model: any module that `torch.fx` can trace. It is left untouched; its parameters and buffers are shared, under
            the same names, so that one optimiser or `state_dict` serves both.
        example_inputs: arguments of a typical call: a tuple, a dict by name, or one tensor. With them the shapes in
            the model are known while it is read (loops over `x.shape[1]` trace), and chains are planned at once;
            without them, at the first call. What the forward asked of its arguments (a shape, the value of a flag)
            holds for that graph alone: a call that differs in it is traced and rewritten anew.
        options: an `Options`, or a dict of its fields.
        pack_parameters: give the result parameters of its own, copied from the model's, in which one `[L, ...]` stands
            for those of all L blocks of a chain: `parameters()` then has few entries, and a gradient costs what the
            kernel costs. `state_dict` and `load_state_dict` keep the model's names. Train the result's `parameters()`;
            optimisers that work on each parameter as a whole (LAMB, say, or norms per tensor) see whole chains.

    Raises:
        CaptureError: the model cannot be traced.
        OptionError, UnsupportedError: a bad argument.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"transform takes a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(pack_parameters, bool):
        raise UnsupportedError(f"pack_parameters must be True or False, got {pack_parameters!r}")
    return TransformedModule(model, example_inputs, Options.of(options), pack_parameters)


class TransformedModule(nn.Module):
    """What `transform` returns: the structure of the model (same `state_dict`), with another `forward`."""

    def __init__(self, model: nn.Module, example_inputs: Any, options: Options, pack_parameters: bool = False) -> None:
        super().__init__()
        if pack_parameters:
            model = copy.deepcopy(model)
        self._pcr_changes = [0]
        self.__dict__.update(_copy_structure(model, {}, self._pcr_changes).__dict__)
        self._pcr_class = type(model)
        self._pcr_example_inputs = example_inputs
        self._pcr_options = options
        self._pcr_signature = inspect.signature(self._model().forward)
        parameters = self._pcr_signature.parameters.values()
        by_place = all(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
        self._pcr_places = tuple(p.name for p in parameters) if by_place else ()
        self._pcr_variants: list[_Variant] = []
        self._pcr_packs: list[Pack] = []
        variant = self._latest()
        if pack_parameters:
            self._pack(variant.run)

    # A compiler has nothing left to do here; to compile what is around the chains, compile the model itself.
    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self._bind(args, kwargs)
        for variant in self._pcr_variants:
            if variant.holds() and variant.captured.holds_for(arguments):
                break
        else:
            variant = self._rewrite(inspect.BoundArguments(self._pcr_signature, OrderedDict(arguments)))
        self._put_first(variant)
        # Past the graph module's own call machinery: hooks were traced, or are this module's own.
        return variant.run.forward(*variant.captured.inputs(arguments))

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name; where each is given by its place there is nothing to find out."""
        if not kwargs and len(args) == len(self._pcr_places):
            return dict(zip(self._pcr_places, args, strict=True))
        return bind_to(self._pcr_signature, self._pcr_class.__name__, args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A copy traces itself when it is first called: graphs refer to modules, native code and memory of their own.
        return {**self.__dict__, "_pcr_variants": []}

    @property
    def report(self) -> RewriteReport:
        """The report for the present mode (training or evaluation), and the latest call in it."""
        return self._latest().report

    def _latest(self) -> _Variant:
        """The latest graph for the present modes: dropout, say, is traced as it stands at the time."""
        variant = next((known for known in self._pcr_variants if known.holds()), None)
        variant = variant or self._rewrite(self._pcr_example_inputs)
        self._put_first(variant)
        return variant

    def _put_first(self, variant: _Variant) -> None:
        if not self._pcr_variants or self._pcr_variants[0] is not variant:
            # A new list: another thread may be going through the old one.
            others = [known for known in self._pcr_variants if known is not variant]
            self._pcr_variants = [variant, *others[: _GRAPHS_KEPT - 1]]

    def _pack(self, run: fx.GraphModule) -> None:
        sources = getattr(run, "attributes", Attributes([])).sources
        operands = [source for source in sources if isinstance(source, StackedAttributes)]
        others = [source.path for source in sources if isinstance(source, Source)]
        self._pcr_packs = pack_operands(self, operands, others)
        for pack in self._pcr_packs:
            pack.take_out()
        self._use_packs(run)

    def _use_packs(self, run: fx.GraphModule) -> None:
        """Have a graph read packed parameters where it would read those that they stand for."""
        if not self._pcr_packs:
            return
        whole = {pack.paths: pack for pack in self._pcr_packs}
        parts = {path: (pack, index) for pack in self._pcr_packs for index, path in enumerate(pack.paths)}
        attributes: Any = run.get_submodule("attributes")

        def packed(source: Source) -> Source:
            return Source(source.path, *parts[source.path]) if source.path in parts else source

        for index, source in enumerate(attributes.sources):
            if isinstance(source, Source):
                attributes.sources[index] = packed(source)
            elif source.paths in whole:
                pack = whole[source.paths]
                attributes.sources[index] = Source(pack.name, pack.holder, pack.name)
            else:
                source.sources = list(map(packed, source.sources))

    def _rewrite(self, example_inputs: Any) -> _Variant:
        with self._unpacked():
            captured, run, report = rewrite_model(self._model(), example_inputs, self._pcr_options, self._pcr_changes)
        self._use_packs(run)
        modes = [(self.get_submodule(name), mode) for name, mode in captured.modes.items()]
        return _Variant(captured.without_graph(), run, report, modes)

    @contextlib.contextmanager
    def _unpacked(self) -> Iterator[None]:
        """The model as it was, with the blocks' own parameters, and no others: a Sequential calls whatever it holds."""
        container = self._modules.pop(CONTAINER, None) if self._pcr_packs else None
        for pack in self._pcr_packs:
            pack.put_back()
        try:
            yield
        finally:
            for pack in self._pcr_packs:
                pack.take_out()
            if container is not None:
                self._modules[CONTAINER] = container

    def __repr__(self) -> str:
        with self._unpacked():  # modules look at their parameters to say what they are
            return super().__repr__()

    def _model(self) -> nn.Module:
        """The model again, in this module's state."""
        model = self._pcr_class.__new__(self._pcr_class)
        model.__dict__ = self.__dict__
        return model

    def _get_name(self) -> str:
        return f"Transformed{self._pcr_class.__name__}"


@dataclass(frozen=True, eq=False)
class _Variant:
    """One traced and rewritten graph. `modes`: the modules whose mode it depends on, each with the mode it is for."""

    captured: Captured
    run: fx.GraphModule
    report: RewriteReport
    modes: list[tuple[nn.Module, bool]]

    def holds(self) -> bool:
        """Whether the modules are in the modes that the graph was traced in."""
        return all([module.training is mode for module, mode in self.modes])


def rewrite_model(
    model: nn.Module, example_inputs: Any, options: Options, changes: list[int]
) -> tuple[Captured, fx.GraphModule, RewriteReport]:
    """`model` as it was captured, rewritten, and what is to be said of that; its attributes are read at each call."""
    way_in = _TracedModel(model, example_inputs, options, changes)
    rewritten = run_passes(way_in, options)
    attributes = _fetch_attributes(rewritten.graph, model, way_in.stacked)
    run = fx.GraphModule({**rewritten.nodes, "attributes": attributes}, rewritten.graph)
    return way_in.captured, run, rewritten.report


class _TracedModel:
    """A model that is traced, on its way through the passes.

    Attributes:
        root: the model.
        captured: its graph.
        stacked: the per-block operands that are attributes of it, by the names that the rewritten graph reads them by.
    """

    captured: Captured

    def __init__(self, model: nn.Module, example_inputs: Any, options: Options, changes: list[int]) -> None:
        self.root, self.example_inputs, self.options, self.changes = model, example_inputs, options, changes
        self.stacked: dict[str, StackedAttributes] = {}

    def capture(self) -> fx.Graph:
        self.captured = capture_model(self.root, self.example_inputs)
        return self.captured.graph

    def place(self, graph: fx.Graph, planned: Sequence[PlannedChain]) -> list[PlannedChain]:
        """All become nodes, since a later call may have another batch size: what to do then, each decides by itself."""
        return [replace(item, node=self._node(item)) for item in planned]

    def _node(self, item: PlannedChain) -> SolveNode:
        node = SolveNode(item.found.chain, self.options, taps=item.found.taps)
        if item.plan is not None:
            node.learn(item.plan)
        return node

    def stack(self, new: fx.Graph, operand: Sequence[fx.Node], copies: dict[fx.Node, fx.Node]) -> fx.Node:
        if any(node.op != "get_attr" for node in operand):
            return new.call_function(stack_operands, ([copies[node] for node in operand],))
        name = f"operand {len(self.stacked)}"  # no attribute of the model can have this name
        sources = [_source(self.root, str(node.target)) for node in operand]
        self.stacked[name] = StackedAttributes(sources, self.changes)
        return new.get_attr(name)


def _fetch_attributes(graph: fx.Graph, model: nn.Module, stacked: dict[str, StackedAttributes]) -> Attributes:
    """Read all attributes of the graph at one place, by name and not by path: a path of four names costs 1 us."""
    found = [node for node in graph.nodes if node.op == "get_attr"]
    first = next((node for node in graph.nodes if node.op != "placeholder"), None)
    if found and first is not None:
        with graph.inserting_before(first):
            fetched = graph.call_module("attributes")
            for index, node in enumerate(found):
                value = graph.call_function(operator.getitem, (fetched, index))
                node.replace_all_uses_with(value)
        for node in found:
            graph.erase_node(node)
    names = [str(node.target) for node in found]
    return Attributes([stacked[name] if name in stacked else _source(model, name) for name in names])


def _source(model: nn.Module, path: str) -> Source:
    """Where an attribute is kept."""
    holder, name = holder_of(model, path)
    assert isinstance(holder, dict), f"the tracer named an attribute that does not exist: {path}"
    return Source(path, holder, name)


def _copy_structure(module: nn.Module, copies: dict[int, nn.Module], changes: list[int]) -> nn.Module:
    """The module tree anew, with the same parameters, buffers and other attributes in it.

    `changes` counts from now on how often a parameter or buffer is exchanged for another.
    """
    if id(module) in copies:
        return copies[id(module)]
    copied = module.__class__.__new__(module.__class__)
    copies[id(module)] = copied
    copied.__dict__ = {
        name: value.copy() if isinstance(value, (dict, set)) and name.startswith("_") else value
        for name, value in module.__dict__.items()
    }
    for name in ("_parameters", "_buffers"):
        copied.__dict__[name] = Watched(copied.__dict__[name], changes)
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else _copy_structure(child, copies, changes)
    return copied
