"""The explicit way in: a module with the same parameters whose chains run through solve nodes."""

from __future__ import annotations

import contextlib
import copy
import inspect
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import _disable_current_modes

from pcr_fx.body.isolation import is_watched_by_a_mode
from pcr_fx.copies import copy_model, copy_structure
from pcr_fx.errors import UnsupportedError
from pcr_fx.graphs.effects import is_barrier
from pcr_fx.operands import Attributes, Source, StackedAttributes
from pcr_fx.optimizers import Joined, MovingOptimizer, check_optimizer
from pcr_fx.options import Options
from pcr_fx.packing import CONTAINER, Pack, pack_operands
from pcr_fx.passes.capture import bind_to
from pcr_fx.passes.report import warn_without_chains
from pcr_fx.progress import stage
from pcr_fx.reports import RewriteReport
from pcr_fx.switches import is_disabled
from pcr_fx.variants import Variant, as_written, carried, may_be_exported, rehearse, rewrite_model
from pcr_fx.watched import Changes, converting, watch

# How many graphs a module keeps, of those used last: one for each mode, and for each of what the forward asked of its
# arguments. Whoever needs more in turn pays for tracing each anew.
_GRAPHS_KEPT = 32


def transform(
    model: nn.Module,
    example_inputs: Any = None,
    options: Any = None,
    *,
    pack_parameters: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
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
            optimisers that work on each parameter as a whole (LAMB, say, or norms per tensor) see whole chains. Blocks that a
            call leaves out get a gradient of zeros, where parameters of their own would get none: one parameter has one
            gradient.
        optimizer: one of the model's, which from now on trains the result: its groups keep their options, what it keeps of
            parameters (moments, steps) moves to the packed ones, with gradients, and its `state_dict` and
            `load_state_dict` keep the form that they have for the model. Parameters of blocks in different groups, or with
            different numbers of steps, stay apart, and the report says so. Only those of `torch.optim` that update each
            number by itself: SGD, Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, Adagrad, Adadelta, Rprop, ASGD. Only with
            `pack_parameters`: without, the result has the model's own parameters.

    Raises:
        CaptureError: the model cannot be traced.
        OptionError, UnsupportedError: a bad argument. The optimizer is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"transform takes a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule | OptimizedModule):
        raise UnsupportedError(
            f"transform takes a model written in Python, got a {type(model).__name__}: give it the model that this was made of"
        )
    if isinstance(model, TransformedModule):
        if model._pcr_packs:
            raise UnsupportedError(
                "transform takes a model with parameters of its own, and those of this one are packed"
            )
        transformed, model = model, object.__new__(_parametrized(model._pcr_class, model))
        model.__dict__.update((name, value) for name, value in transformed.__dict__.items() if name[:5] != "_pcr_")
    if not isinstance(pack_parameters, bool):
        raise UnsupportedError(f"pack_parameters must be True or False, got {pack_parameters!r}")
    if optimizer is not None:
        check_optimizer(optimizer)
        if not pack_parameters:
            raise UnsupportedError(
                "optimizer goes with pack_parameters=True: without it the result has the model's own parameters, which the "
                "optimizer has already"
            )
    # What a container holds are its items, and packed parameters are none.
    is_model = not (pack_parameters and isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict))
    is_parametrized = parametrize.is_parametrized(model)
    made = _remake(type(model).__bases__[0] if is_parametrized else type(model), is_model)
    # Past the `__setattr__` of the model's class, which may allow only attributes that it knows.
    object.__setattr__(made, "__class__", _parametrized(type(made), model))
    TransformedModule.__init__(made, model, example_inputs, Options.of(options), pack_parameters, optimizer)
    return made


class TransformedModule(nn.Module):
    """What `transform` returns: the structure of the model (same `state_dict`), with another `forward`."""

    # The model's.
    _pcr_class: type[nn.Module]
    _pcr_changes: Changes
    _pcr_example_inputs: Any
    _pcr_options: Options
    _pcr_signature: inspect.Signature
    _pcr_places: tuple[str, ...]
    _pcr_variants: list[Variant]
    _pcr_packs: list[Pack]
    _pcr_notes: list[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Another model of the class, as its methods make it: a part of a Sequential, say; or one that gets its state later."""
        return cls._pcr_class(*args, **kwargs) if args or kwargs else object.__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing, and not what the model's class does for another: enter it in a list of models, say."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        options: Options,
        pack_parameters: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not that of the model's class
        moving = None
        if pack_parameters:
            model, copies = copy_model(model)
            moving = None if optimizer is None else MovingOptimizer(optimizer, copies)
        self.__dict__.update(copy_structure(model).__dict__)
        for module in self.modules():
            if isinstance(module, TransformedModule):  # a copy of one within, of which graphs of the other know nothing
                module.__dict__.update(_pcr_changes=Changes(), _pcr_variants=[])
        signature = inspect.signature(self._model().forward)
        parameters = signature.parameters.values()
        by_place = all(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
        # Past the `__setattr__` of the model's class, which may allow only attributes that it knows.
        self.__dict__.update(
            _pcr_changes=Changes(),
            _pcr_example_inputs=example_inputs,
            _pcr_options=options,
            _pcr_signature=signature,
            _pcr_places=tuple(p.name for p in parameters) if by_place else (),
            _pcr_variants=[],
            _pcr_packs=[],
            _pcr_notes=[],
        )
        variant = self._latest()
        if pack_parameters:
            self._pack(variant, moving)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and _may_not_break():
            if not torch.compiler.is_dynamo_compiling():
                return self._pcr_carried(args, kwargs)
            # The model as it was written: who compiles it sees to it that what is read of it holds.
            if not isinstance(self, self._pcr_class):
                raise UnsupportedError(
                    f"a {type(self).__name__} with packed parameters cannot be read by another compiler"
                )
            return self._pcr_class.forward(self, *args, **kwargs)
        return self._pcr_run(args, kwargs)

    @torch.compiler.disable
    def _pcr_run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward by what the model was rewritten to, in which a compiler has nothing left to do."""
        arguments = self._bind(args, kwargs)
        for variant in self._pcr_variants:
            if variant.holds_for(arguments):
                break
        else:
            variant = self._rewrite(inspect.BoundArguments(self._pcr_signature, OrderedDict(arguments)))
        self._put_first(variant)
        if variant.rehearsal is not None and variant.rehearsal.takes_over:
            return variant.rehearsal.run(self._as_written(), args, kwargs)
        # Past the graph module's own call machinery: hooks were traced, or are this module's own.
        if variant.switches:
            with kept_settings():
                return variant.run.forward(*variant.captured.inputs(arguments))
        return variant.run.forward(*variant.captured.inputs(arguments))

    def _pcr_carried(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward for an exporter, with its chains as operators that any process can run."""
        arguments = self._bind(args, kwargs)
        variant = next((known for known in self._pcr_variants if may_be_exported(known, arguments)), None)
        if variant is None:
            return self._as_written()(*args, **kwargs)
        return carried(variant).forward(*variant.captured.inputs(arguments))

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name; where each is given by its place there is nothing to find out."""
        if not kwargs and len(args) == len(self._pcr_places):
            return dict(zip(self._pcr_places, args, strict=True))
        return bind_to(self._pcr_signature, self._pcr_class.__name__, args, kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        with converting():
            return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        models_own = getattr(super(), "__deepcopy__", None)
        if models_own is not None:
            return models_own(memo)
        made = memo[id(self)] = object.__new__(type(self))
        made.__dict__.update(copy.deepcopy({**self.__dict__, "_pcr_variants": []}, memo))
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _remake, (self._pcr_class, isinstance(self, self._pcr_class)), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        # A copy traces itself when it is first called: graphs refer to modules, native code and memory of their own. What the
        # model's class leaves out, as recurrent networks their references to weights, it makes anew itself.
        state = super().__getstate__()
        return {**(state if isinstance(state, dict) else self.__dict__), "_pcr_variants": []}

    @property
    def report(self) -> RewriteReport:
        """The report for the present mode (training or evaluation), and the latest call in it."""
        return self._latest().report

    def _latest(self) -> Variant:
        """The latest graph for the present modes: dropout, say, is traced as it stands at the time."""
        variant = next((known for known in self._pcr_variants if known.holds()), None)
        variant = variant or self._rewrite(self._pcr_example_inputs)
        self._put_first(variant)
        return variant

    def _put_first(self, variant: Variant) -> None:
        if not self._pcr_variants or self._pcr_variants[0] is not variant:
            # A new list: another thread may be going through the old one.
            others = [known for known in self._pcr_variants if known is not variant]
            kept = [variant, *others[: _GRAPHS_KEPT - 1]]
            object.__setattr__(self, "_pcr_variants", kept)  # past what counts changes of the model

    def _pack(self, variant: Variant, moving: MovingOptimizer | None) -> None:
        sources = getattr(variant.run, "attributes", Attributes([])).sources
        operands = [source for source in sources if isinstance(source, StackedAttributes)]
        others = [source.path for source in sources if isinstance(source, Source)]
        others += variant.captured.found_elsewhere
        also = () if moving is None else (moving.why_apart,)
        packs, notes = pack_operands(self, operands, others, *also)
        self.__dict__.update(_pcr_packs=packs, _pcr_notes=notes)
        joined = [
            Joined(f"{CONTAINER}.{pack.name}", pack.parameter, [home.holder[home.name] for home in pack.homes])
            for pack in packs
        ]
        for pack in packs:
            pack.take_out()
        self._use_packs(variant)
        if moving is not None:
            moving.finish(joined)

    def _use_packs(self, variant: Variant) -> None:
        """Have a graph read packed parameters where it would read those that they stand for."""
        variant.report.notes += self._pcr_notes
        for entry in variant.report.chains:
            entry.parameters -= {home.path for pack in self._pcr_packs for home in pack.homes}
            entry.is_packed = bool(self._pcr_packs or self._pcr_notes)
        if not self._pcr_packs:
            return

        def place(source: Source) -> tuple[int, str]:
            return id(source.holder), source.name

        whole = {tuple(map(place, pack.homes)): pack for pack in self._pcr_packs}
        parts = {place(home): (pack, index) for pack in self._pcr_packs for index, home in enumerate(pack.homes)}
        attributes: Any = variant.run.get_submodule("attributes")

        def packed(source: Source) -> Source:
            return Source(source.path, *parts[place(source)]) if place(source) in parts else source

        for index, source in enumerate(attributes.sources):
            if isinstance(source, Source):
                attributes.sources[index] = packed(source)
            elif (pack := whole.get(tuple(map(place, source.sources)))) is not None:
                attributes.sources[index] = Source(pack.name, pack.holder, pack.name)
            else:
                source.sources = list(map(packed, source.sources))

    def _rewrite(self, example_inputs: Any) -> Variant:
        if is_disabled():
            variant = as_written(self._model(), self._pcr_changes)
            warn_without_chains(variant.report)
            return variant
        watch(self, self._pcr_changes)
        # What counts or logs ops gets none of those that are run to read the model.
        unseen = _disable_current_modes() if is_watched_by_a_mode() else contextlib.nullcontext()
        with self._unpacked(), unseen, stage(f"reading {self._pcr_class.__name__} and finding its chains"):
            captured, run, report = rewrite_model(self._model(), example_inputs, self._pcr_options, self._pcr_changes)
        rehearsal = rehearse(captured.model_facts, run.graph, report)
        warn_without_chains(report, "" if rehearsal is None else rehearsal.reason)
        switches = any(map(is_barrier, run.graph.nodes))
        variant = Variant(captured.without_graph(), run, report, rehearsal, switches)
        self._use_packs(variant)
        return variant

    def _as_written(self) -> Callable[..., Any]:
        """The model's own forward."""
        if isinstance(self, self._pcr_class):
            return types.MethodType(self._pcr_class.forward, self)
        model: Any = object.__new__(_parametrized(self._pcr_class, self))
        own = {name: module for name, module in dict.items(self._modules) if name != CONTAINER}
        object.__setattr__(model, "__dict__", {**self.__dict__, "_modules": own})
        return model.forward  # type: ignore[no-any-return]

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

    def _model(self) -> nn.Module:
        """The model again, in this module's state."""
        model: Any = object.__new__(_parametrized(self._pcr_class, self))
        object.__setattr__(model, "__dict__", self.__dict__)
        return model


@contextlib.contextmanager
def kept_settings() -> Iterator[None]:
    """Have gradients and autocast afterwards be what they were, whatever happens."""
    devices = [
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")
    ]
    depth = torch.autocast_increment_nesting()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        while torch.autocast_decrement_nesting() >= depth:
            pass
        if depth == 1:
            torch.clear_autocast_cache()
        for device, enabled, dtype in devices:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


# By the class of the model, and whether they are subclasses of that.
_classes: weakref.WeakKeyDictionary[type, dict[bool, type[TransformedModule]]] = weakref.WeakKeyDictionary()


def _class_for(kind: type[nn.Module], is_model: bool) -> type[TransformedModule]:
    """`TransformedModule` for a class of models. It is a subclass of that: who looks for its methods, or asks for it, finds it.

    Args:
        is_model: whether it is to be that.
    """
    made = _classes.setdefault(kind, {})
    if is_model not in made:
        plain, model = TransformedModule.forward, kind.forward
        # As trainers and exporters look at it.
        forward = FunctionType(plain.__code__, plain.__globals__, "forward", plain.__defaults__, plain.__closure__)
        forward.__kwdefaults__ = plain.__kwdefaults__
        forward.__doc__, forward.__module__ = model.__doc__, getattr(model, "__module__", kind.__module__)
        with contextlib.suppress(TypeError, ValueError):  # it has none
            forward.__signature__ = inspect.signature(model)  # type: ignore[attr-defined]
        described = {
            "__doc__": kind.__doc__,
            "__module__": kind.__module__,
            "_pcr_class": kind,
            "forward": forward,
        }
        if hasattr(kind, "report"):  # the model's own; `pcr_fx.report` gives ours
            described["report"] = inspect.getattr_static(kind, "report")
        bases = (TransformedModule, kind) if is_model else (TransformedModule,)
        try:
            made[is_model] = types.new_class(
                f"Transformed{kind.__name__}", bases, {}, lambda body: body.update(described)
            )
        except TypeError:  # it may not be inherited from
            made[is_model] = _class_for(kind, False)
    return made[is_model]


_NOT_INHERITED = ("__dict__", "__weakref__", "__doc__", "__deepcopy__")


def _parametrized(kind: type, model: nn.Module) -> type:
    """A class of models for one that is parametrized, as PyTorch makes them: with a property for each such parameter."""
    if not parametrize.is_parametrized(model):
        return kind
    held = {name: value for name, value in vars(type(model)).items() if name not in _NOT_INHERITED}
    return type(f"Parametrized{kind.__name__}", (kind,), held)


def _may_not_break() -> bool:
    """Whether Dynamo is tracing, and may not break its graph here, or the model is exported without it."""
    if torch.compiler.is_dynamo_compiling():  # which in PyTorch 2.11 takes all that it traces for an export
        return _is_one_graph()
    return torch.compiler.is_exporting()


@torch._dynamo.assume_constant_result
def _is_one_graph() -> bool:
    """Dynamo runs this while it traces."""
    tracing = InstructionTranslator.current_tx()
    return bool(tracing.one_graph or tracing.export)


def _remake(kind: type[nn.Module], is_model: bool) -> TransformedModule:
    """One that is to be given its state."""
    return object.__new__(_class_for(kind, is_model))
