"""The symbolic tracer behind `capture.py`: one pass through a model's forward, with stand-ins for its tensors."""

from __future__ import annotations

import contextlib
import inspect
import operator
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import (
    Tensor,
    fx,
    get_autocast_dtype,
    is_autocast_enabled,
    is_grad_enabled,
    is_inference_mode_enabled,
    nn,
)
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.utils import _pytree as pytree

from pcr_fx.errors import CaptureError
from pcr_fx.graphs.attributes import attribute, holder_of
from pcr_fx.graphs.effects import RESHAPING_METHODS, draws_by_shape
from pcr_fx.graphs.hooks import AfterForward, BeforeForward, HookOp, is_part_of_forward, tensors_in
from pcr_fx.passes.contents import items_in, put_back
from pcr_fx.passes.known_values import TELLING, KnownValues, NotKnown
from pcr_fx.passes.open_sizes import OpenSize, close_what_repeats, closed, may_stay_open, place_in_argument
from pcr_fx.passes.own_functions import record_call
from pcr_fx.passes.raw_tensors import RawTensors
from pcr_fx.passes.reading import AUTOCAST_DEVICES, CONSTANT, Reading, depends_on_inputs
from pcr_fx.passes.shapes import UNKNOWN, Answers, FakeValues, Questions, whole_shapes
from pcr_fx.passes.stand_ins import (
    ADVICE,
    KnownStandIn,
    StandIn,
    at,
    lenient,
    may_be_number,
    user_line,
)
from pcr_fx.passes.stores import Place, buffers_set, store_of


class ModelTracer(fx.Tracer):
    """Traces through every module.

    Args:
        model: the root.
        arguments: of its forward, by name.
        known: whether they are real, so that shapes can be followed; otherwise `Tensor` stands for each tensor.
    """

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any], known: bool) -> None:
        super().__init__()
        self.arguments = arguments
        self.questions = Questions()
        # The nodes that take sizes anew at each call, by the tensor and the dimension.
        self.open_sizes: dict[tuple[fx.Node, int], tuple[fx.Node, OpenSize]] = {}
        # How many ops that may take such each line of the model has made.
        self.lines_with_sizes = Counter[str]()
        # Whether tensors were given other shapes, so that sizes may be others than when they were read.
        self.reshapes = False
        # The base class searches all parameters for each one that it meets.
        self.names = {id(value): name for name, value in [*model.named_buffers(), *model.named_parameters()]}
        # Parameters and buffers that the forward came by otherwise than as attributes, by path.
        self.found_elsewhere: set[str] = set()
        # Tensors that modules keep as neither parameters nor buffers, by path.
        self.stored: dict[str, Tensor] = {}
        self.values = FakeValues(arguments, self._attribute) if known else None
        self.settings = self.present = _settings()
        # How to close what the graph has switched, in the order that it did.
        self.opened: list[tuple[Any, Any]] = []
        self.read = Reading(model)
        self.module_stack = _ModuleStack()
        # Where the graph stores something, by who keeps it and name; and what there is to say of what it does not.
        self.is_stored: set[tuple[int, str]] = set()
        self.notes: dict[str, None] = {}
        # What was asked for whether it requires gradients: who keeps it, or `None` for an argument; its name; the answer.
        self.gradients: list[tuple[Mapping[str, Any] | None, str, bool]] = []
        self.checkpoint: object = None
        self.known = KnownValues(self)

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        with _undisturbed(root, self.read), self.read.recording(), RawTensors(self), lenient():
            graph = super().trace(root, concrete_args)
            close_what_repeats(graph, self.open_sizes, self.lines_with_sizes)
            grown = self.read.refuse_changes(self.is_stored, ADVICE)
            self.notes |= dict.fromkeys(f"{name}, to which the forward adds, is not added to" for name in grown)
        return graph

    def answers(self, graph: fx.Graph) -> Answers | None:
        """What the forward was told of shapes, as `Captured` has it."""
        return self.questions.kept(graph, self.values)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """The forward with its arguments: stand-ins for those that hold tensors, all others as they are."""
        arguments = {}
        for name, value in self.arguments.items():
            stands_in = value is Tensor or any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
            arguments[name] = self.create_proxy("placeholder", name, (), {}) if stands_in else value
        with self.read.listening(True):
            forward = self.root.forward
        args, kwargs = _as_call(inspect.signature(forward), arguments)
        for path, module in self.root.named_modules():
            for name, value in list(module.__dict__.items()):
                if isinstance(value, Tensor):
                    place = f"{path}.{name}".lstrip(".")
                    self.stored[place] = value
                    module.__dict__[name] = self.create_proxy("get_attr", place, (), {})

        self.read.stores.begin(self.root.modules())

        def run() -> Any:
            with self.read.listening(True):
                result = forward(*args, **kwargs)
            self._follow_settings("")
            self._store(self.root.modules())
            for place in list(self.read.stores.elsewhere()):
                self._store_one(place)
            return result

        return run, []

    def path_of_module(self, mod: nn.Module) -> str:
        known = self.submodule_paths.get(mod) if self.submodule_paths else None
        return type(mod).__name__ if known is None else known  # not every module that is called is a submodule

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hooks are ops of the graph, since what they do beside computing is to be done at each call."""
        if hasattr(m, "_pcr_class"):
            forward = self._forward_of_transformed(m)
        if not self.read.calls(m):
            return super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        self._store(m.modules())  # hooks may look at it
        args, kwargs = closed(whole_shapes((args, kwargs)))
        for hook in m._forward_pre_hooks.values():
            if is_part_of_forward(hook):
                hook(m, args)
        before = BeforeForward(m, path, (args, kwargs))
        *tensors, state = self._run_hooks(before, tensors_in((args, kwargs)), len(before.places) + 1)
        args, kwargs = before.values(tensors)
        result = super().call_module(m, forward if hasattr(m, "_pcr_class") else m.forward, args, kwargs)
        self._store(m.modules())
        after = AfterForward(m, path, result)
        return after.values(self._run_hooks(after, [state, *tensors_in(result)], len(after.places)))

    def _forward_of_transformed(self, module: Any) -> Any:
        """The forward of the model that a transformed module within was made of: the whole is transformed."""
        if module._pcr_packs:
            raise CaptureError(
                f"{self.path_of_module(module)} is a transformed module with packed parameters, which cannot be part of another: "
                "transform the whole model, and pack it there"
            )
        self.read.of_class(module._pcr_class, "forward")
        return module._as_written()

    def call_with_derivative(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return record_call(self, function, args, kwargs)

    @contextmanager
    def in_checkpoint(self) -> Iterator[None]:
        """For the ops whose results are to be computed again in the backward."""
        before, self.checkpoint = self.checkpoint, self.checkpoint or object()
        try:
            yield
        finally:
            self.checkpoint = before

    def _run_hooks(self, op: HookOp, given: list[Any], count: int) -> list[Any]:
        unknown = [leaf for leaf in op.leaves if not _may_be_constant(leaf)]
        if unknown:
            raise CaptureError(f"{op.path} has hooks, and is given or returns a {type(unknown[0]).__name__}; {ADVICE}")
        results = self.create_proxy("call_function", op, tuple(given), {})
        return [results[index] for index in range(count)]

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, nn.Parameter):
            return self.constant(a).node
        if isinstance(a, torch.Generator):
            raise CaptureError(f"the model draws from a torch.Generator{at(user_line(sys._getframe(1)))}; {ADVICE}")
        if isinstance(a, dict):
            a = {_key(key): value for key, value in a.items()}
        return super().create_arg(_literal(a))

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        name = self.names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def constant(self, tensor: Tensor) -> fx.Proxy:
        """A stand-in for a tensor that the forward came by otherwise than as an attribute of a module."""
        name = self.names.get(id(tensor)) or self.tensor_attrs.get(tensor)
        if name is None:
            name = self.tensor_attrs[tensor] = self.get_fresh_qualname(CONSTANT)
            self.root.__dict__[name] = tensor
        elif not name.startswith(CONSTANT):
            self.found_elsewhere.add(name)
            path, _, own = name.rpartition(".")
            self.read.is_at(self.root.get_submodule(path), own, tensor)
        return self.create_proxy("get_attr", name, (), {})

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        if kind == "call_method" and target in TELLING and isinstance(args[0], fx.Proxy):
            with contextlib.suppress(NotKnown):
                return getattr(self.known.of(args[0].node), target)(*args[1:], **kwargs)
        if target is operator.getitem:
            args = args[0], self.known.place(args[1])
        if target is torch.where and getattr(args[0], "dtype", None) is torch.uint8:  # an old form of truth values
            args = args[0].bool(), *args[1:]
        line = user_line(sys._getframe(1))
        self._follow_settings(line)
        self.reshapes |= kind == "call_method" and target in RESHAPING_METHODS
        if not self.reshapes and may_stay_open(target, args, kwargs):
            self.lines_with_sizes[line] += 1
            args, kwargs = pytree.tree_map_only(OpenSize, self._taken_anew, (args, kwargs))
        # `normalise.py` lets noise take its shape from anything that has the same in this graph.
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        self.questions.every_size |= draws_by_shape(proxy.node)
        proxy.node.meta["stack_trace"] = line
        if self.checkpoint is not None:
            proxy.node.meta["recompute"] = self.checkpoint
        if self.values is None:
            proxy.node.meta["may_be_number"] = may_be_number(proxy.node)
            return proxy
        with self.read.listening(False):
            value = proxy.node.meta["example_value"] = self.known.form_of(proxy.node, self.values)
        return proxy if target is getattr or isinstance(target, HookOp) else self._handed_out(proxy, value)

    def _follow_settings(self, line: str) -> None:
        """Have the graph switch gradients and autocast as the model has done since the last op."""
        now = _settings()
        if now == self.present:
            return
        (gradients, inference, *autocast), (_, usual, *usually) = now, self.settings
        if inference != usual:
            raise CaptureError(f"the model switches inference mode on or off{at(line)}; {ADVICE}")
        for close, argument in reversed(self.opened):
            self._switch(close, (argument,), line)
        self.opened, self.present = [], now
        for device, (enabled, dtype), before in zip(AUTOCAST_DEVICES, autocast, usually, strict=True):
            if (enabled, dtype) != before:
                entered = self._switch(_enter_autocast, (device, dtype, enabled, None), line)
                self.opened.append((_exit_autocast, entered))
        if gradients != self.settings[0]:
            self._switch(torch._C._set_grad_enabled, (gradients,), line)
            self.opened.append((torch._C._set_grad_enabled, not gradients))

    def _switch(self, function: Any, args: tuple[Any, ...], line: str) -> fx.Node:
        node = self.create_node("call_function", function, args, {})
        node.meta["stack_trace"] = line
        return node

    def _taken_anew(self, size: OpenSize) -> fx.Proxy | int:
        """A size as an op of the graph; a number if it is none of an argument."""
        source = place_in_argument(*size.source)
        if source is None:
            return size.asked()
        if source not in self.open_sizes:
            node = self.create_node("call_method", "size", source, {})
            node.meta["example_value"], node.meta["stack_trace"] = size.value, ""
            self.open_sizes[source] = node, size
        return self.proxy(self.open_sizes[source][0])

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return KnownStandIn(node, self) if self.values is not None else StandIn(node, self)

    def _handed_out(self, proxy: fx.Proxy, value: Any) -> Any:
        """What the model gets: a tuple must be one, since it may be unpacked or measured, and a number is a number."""
        if isinstance(value, Tensor) or value is None or proxy.node.op in ("get_attr", "output"):
            return proxy
        node = proxy.node
        if _is_constant(value):
            args, kwargs = node.args, node.kwargs
            self.graph.erase_node(node)
            if node.op == "call_method" and node.target == "size":
                shape = args[0].meta["example_value"].shape  # type: ignore[union-attr]
                sizes = self.questions.sizes(args[0], shape)  # type: ignore[arg-type]
                return sizes if isinstance(value, tuple) else sizes[args[1] if len(args) > 1 else kwargs["dim"]]
            return self.questions.ask(node.op, node.target, args, kwargs, value)
        if type(value) in (tuple, list):
            if node.op != "placeholder":  # how many tensors an argument holds is a fact in any case
                self.questions.length(node, value)
            return type(value)(proxy[index] for index in range(len(value)))  # type: ignore[index]
        if type(value) is dict:
            return {name: proxy[name] for name in value}  # type: ignore[index]
        return proxy

    def _attribute(self, path: str) -> Any:
        return self.stored[path] if path in self.stored else attribute(self.root, path)

    def takes_value_of(self, path: str) -> None:
        """Take note that the graph hangs on what an attribute holds."""
        value, (path, _, name) = self._attribute(path), path.rpartition(".")
        if not name.startswith(CONSTANT):
            self.read.is_at(self.root.get_submodule(path), name, value)
        self.read.computes_with(value)

    # --- what a model may ask of a stand-in -------------------------------------------------------------------------

    def requires_grad(self, node: fx.Node) -> bool | None:
        """Whether an argument or an attribute does, which is taken for granted from now on; `None` for what is computed of such.

        What is computed of constants alone does not.
        """
        name, value = str(node.target), None
        if node.op == "placeholder":
            value = self.arguments[name]
            holder = None
        elif node.op == "get_attr":
            holder, name = holder_of(self.root, name)
            value = holder[name] if isinstance(holder, dict) else None
        if not isinstance(value, Tensor):
            origins = self.known.origins(node)
            return (
                None if origins is None else any([self.requires_grad(one) for one in origins if one.op == "get_attr"])
            )
        self.gradients.append((holder, name, value.requires_grad))
        return value.requires_grad

    def to_bool(self, obj: fx.Proxy) -> bool:
        line = user_line(sys._getframe(1))
        with contextlib.suppress(NotKnown):
            return bool(self.known.of(obj.node))
        if obj.node.target is getattr and obj.node.args[1] in UNKNOWN:
            what = f"the model asks for {obj.node.args[1]} of a tensor{at(line)}"
            hint = "" if self.values is not None else f"pass example_inputs if it is one of {_inputs(obj)}; "
            raise CaptureError(f"{what}, which is not known while it is read; {hint}{ADVICE}")
        hint = "" if self.values is not None else f"pass example_inputs if it asks for a shape of {_inputs(obj)}; "
        raise CaptureError(f"the model branches on the value of a tensor{at(line)}; {hint}{ADVICE}")

    def number(self, obj: fx.Proxy) -> Any:
        """The number that a tensor of one holds."""
        try:
            return self.known.of(obj.node)
        except NotKnown:
            line = user_line(sys._getframe(2))
            raise CaptureError(f"the model reads the number in a tensor{at(line)}; {ADVICE}") from None

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value = obj.node.meta.get("example_value")
        if isinstance(value, (Tensor, tuple, list)):
            return iter([obj[index] for index in range(self.questions.length(obj.node, value))])  # type: ignore[index]
        line = user_line(sys._getframe(1))
        raise CaptureError(
            f"the model iterates over a tensor of unknown shape{at(line)}; pass example_inputs: "
            f"the shape comes from {_inputs(obj)}"
        )

    # --- what a model stores ------------------------------------------------------------------------------------------

    def _store(self, modules: Iterable[nn.Module]) -> None:
        """Have the graph store what the forward stored in modules since this was last asked for."""
        modules = list(modules)
        for place in [*buffers_set(modules), *self.read.stores.in_modules(modules)]:
            if not place.name.startswith(CONSTANT):
                self._store_one(place)

    def _store_one(self, place: Place) -> None:
        value = place.now
        if isinstance(value, fx.Proxy) and value.node.op == "get_attr":
            return
        proxies = [item for item in items_in([value]) if isinstance(item, fx.Proxy)]
        # What is made of no input, such as a mask of some size, is made to save time, and is made anew at each call.
        evolves = not proxies or isinstance(place.before, Tensor | fx.Proxy) or any(map(depends_on_inputs, proxies))
        store = store_of(place, self.read.reads(place.key), ADVICE) if evolves else None
        if store is not None:
            self.is_stored.add(place.key)
            self.create_node("call_function", store[0], tuple(store[1]), {})
        elif not type(place.module).__module__.startswith("torch.nn."):  # whose own lists of weights only save time
            self.notes[f"{place}, which the forward sets, is not set by the transformed module"] = None


class _ModuleStack(OrderedDict[str, Any]):
    """The base class copies its module stack for each node; an ordinary dict is copied in a tenth of the time."""

    def __copy__(self) -> dict[str, Any]:
        return dict(self)


def _may_be_constant(value: Any) -> bool:
    return isinstance(value, (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size, slice))


def _inputs(proxy: fx.Proxy) -> str:
    """The arguments of the model that a value is computed from, by name."""
    seen, pending = {proxy.node}, [proxy.node]
    while pending:
        found = set(pending.pop().all_input_nodes) - seen
        seen |= found
        pending += found
    return ", ".join(sorted(str(node.target) for node in seen if node.op == "placeholder")) or "no input"


def _is_constant(value: Any) -> bool:
    """A number, a dtype or a device, or a tuple of such: `size()` returns one."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_constant, value))
    return isinstance(value, (bool, int, float, torch.dtype, torch.device))


# How to read the value of what is derived from Python's own types, whatever it makes of that itself.
_VALUES: dict[type, Any] = {int: int.__pos__, float: float.__pos__, complex: complex.__pos__, str: str.__str__}


def _literal(value: Any) -> Any:
    """A number or text as one of Python's own: graphs are printed as code, and a `repr` may be anything.

    Anything else is returned as it is.
    """
    if type(value) in _VALUES or type(value) is bool:
        return value
    if type(value) is OpenSize:
        return value.asked()
    if isinstance(value, np.generic):
        value = value.item()
    for kind, read in _VALUES.items():
        if isinstance(value, kind) and type(value) is not bool:
            return read(value)
    return value


def _key(value: Any) -> Any:
    """A key of a dict, which the graph's code names as well."""
    if isinstance(value, tuple):
        return tuple(map(_key, value))
    value = _literal(value)
    if value is None or type(value) in (*_VALUES, bool, torch.dtype, torch.device):
        return value
    raise CaptureError(f"the model makes a dict with a key of type {type(value).__name__}; {ADVICE}")


def _as_call(signature: inspect.Signature, arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """How to pass arguments: by name where that is possible, since wrappers add arguments of theirs by name."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    parameters = signature.parameters
    several = next((p.name for p in parameters.values() if p.kind is p.VAR_POSITIONAL and arguments.get(p.name)), None)
    before_several = list(parameters)[: list(parameters).index(several)] if several else []
    for name, value in arguments.items():
        kind = parameters[name].kind
        if name == several:
            args += value
        elif kind is inspect.Parameter.VAR_KEYWORD:
            kwargs.update(value)
        elif kind is inspect.Parameter.POSITIONAL_ONLY or name in before_several:
            args.append(value)
        else:
            kwargs[name] = value
    return args, kwargs


def _settings() -> tuple[Any, ...]:
    """What decides how all ops run, and is no part of the graph."""
    return (
        is_grad_enabled(),
        is_inference_mode_enabled(),
        *((is_autocast_enabled(device), get_autocast_dtype(device)) for device in AUTOCAST_DEVICES),
    )


@contextmanager
def _undisturbed(model: nn.Module, read: Reading) -> Iterator[None]:
    """Take back what the forward stores in its modules: stand-ins for tensors are of no use there afterwards."""
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    buffers = [(module._buffers, dict(module._buffers)) for module, _ in before]
    try:
        yield
    finally:
        for module, state in before:
            for name in [name for name in module.__dict__ if name not in state]:
                # The graph's own constants stay.
                if not name.startswith(CONSTANT):
                    del module.__dict__[name]
            module.__dict__.update(state)
        for now, then in [*buffers, *read.copies]:
            put_back(now, then)
        read.stores.put_back()
