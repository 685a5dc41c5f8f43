"""Read a model into an FX graph by symbolic tracing, through every module and, given inputs, with known shapes."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pcr_fx.errors import CaptureError, UnsupportedError

_OWN_PACKAGES = tuple(
    os.path.dirname(os.path.abspath(module.__file__ or "")) + os.sep for module in (torch, sys.modules[__name__])
)


def capture_model(model: nn.Module, example_inputs: Any = None) -> fx.Graph:
    """The graph of `model`'s forward.

    Every node has `nn_module_stack` and `stack_trace` in its meta, and with `example_inputs` an `example_value`: a
    fake tensor (or whatever the op returns) that holds shape, dtype and device.

    Args:
        model: the module to read.
        example_inputs: its arguments: a tuple or list of positional ones, a dict of named ones, or one tensor.

    Raises:
        CaptureError: the forward branches on the value of a tensor, or otherwise cannot be traced.
        UnsupportedError: `example_inputs` do not fit the forward.
    """
    arguments = _bind(model, example_inputs)
    tracer = _ModelTracer(model, arguments)
    try:
        return tracer.trace(model, concrete_args=_constants(model, arguments))
    except CaptureError:
        raise
    except Exception as error:
        known = "" if arguments is not None else " (pass example_inputs if it needs the shapes of its inputs)"
        raise CaptureError(
            f"{type(model).__name__} cannot be traced{known}: {error}. "
            'torch.compile(model, backend="deeppcr") reads models with such control flow.'
        ) from error


def _bind(model: nn.Module, example_inputs: Any) -> dict[str, Any] | None:
    """`example_inputs` by parameter name."""
    if example_inputs is None:
        return None
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    signature = inspect.signature(model.forward)
    try:
        if isinstance(example_inputs, Mapping):
            bound = signature.bind(**example_inputs)
        elif isinstance(example_inputs, Sequence):
            bound = signature.bind(*example_inputs)
        else:
            raise TypeError(f"a tuple, list, dict or tensor is allowed, got {type(example_inputs).__name__}")
    except TypeError as error:
        raise UnsupportedError(
            f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from error
    bound.apply_defaults()
    return dict(bound.arguments)


def _constants(model: nn.Module, arguments: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments to trace as what they are: flags and absent tensors decide which code runs.

    The traced model checks that it is called with the same.
    """
    parameters = inspect.signature(model.forward).parameters
    if arguments is None:
        defaults = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
        return {name: value for name, value in defaults.items() if not isinstance(value, Tensor)}
    return {
        name: value
        for name, value in arguments.items()
        if isinstance(value, (bool, int, float, str, type(None)))
    }


class _ModelTracer(fx.Tracer):
    def __init__(self, model: nn.Module, arguments: dict[str, Any] | None) -> None:
        super().__init__()
        self.arguments = arguments
        # The base class searches all parameters for each one that it meets.
        self.names = {id(value): name for name, value in [*model.named_buffers(), *model.named_parameters()]}
        self.mode = FakeTensorMode(allow_non_fake_inputs=True) if arguments is not None else None
        # By what they look like: blocks that repeat ask the same question again and again.
        self.fakes: dict[Any, Tensor] = {}
        self.values: dict[Any, Any] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        name = self.names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        proxy.node.meta["stack_trace"] = _user_line(sys._getframe(1))
        if self.mode is None:
            return proxy
        self._evaluate(proxy.node)
        value = proxy.node.meta.get("example_value")
        # What is a tuple to the model must be one here: it may be unpacked, measured or asked for its type.
        return type(value)(iter(proxy)) if type(value) in (tuple, list) else proxy

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _KnownProxy(node, self) if self.mode is not None else super().proxy(node)

    def _evaluate(self, node: fx.Node) -> None:
        """What the op would return for the example inputs, without computing it."""
        assert self.mode is not None and self.arguments is not None
        if node.op == "placeholder":
            argument = self.arguments.get(str(node.target).lstrip("*"))
            node.meta["example_value"] = fx.node.map_aggregate(argument, self._fake)  # type: ignore[arg-type]
        elif node.op == "get_attr":
            node.meta["example_value"] = self._fake(attribute(self.root, str(node.target)))
        elif node.op in ("call_function", "call_method"):
            node.meta["example_value"] = self._result(node)

    def _result(self, node: fx.Node) -> Any:
        assert self.mode is not None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: arg.meta.get("example_value"))
        try:
            key = (node.op, node.target, _frozen(args), _frozen(kwargs))
            if key in self.values:
                return self.values[key]
        except TypeError:
            key = None
        with self.mode, torch.no_grad():
            if node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                value = node.target(*args, **kwargs)  # type: ignore[operator]
        value = fx.node.map_aggregate(value, self._fake) if type(value) in (tuple, list) else self._fake(value)
        if key is not None:
            self.values[key] = value
        return value

    def _fake(self, value: Any) -> Any:
        """The one fake tensor that looks like `value`: shape, dtype and device are all that is asked of it."""
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return value
        assert self.mode is not None
        key = (value.shape, value.stride(), value.dtype, value.device)
        if key not in self.fakes:
            with self.mode:
                self.fakes[key] = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device=value.device
                )
        return self.fakes[key]

    def to_bool(self, obj: fx.Proxy) -> bool:
        value = obj.node.meta.get("example_value")
        if isinstance(value, (bool, int, float)):
            return bool(value)
        raise CaptureError(
            f"the model branches on the value of a tensor at {_user_line(sys._getframe(1)).strip() or 'an unknown line'}; "
            'torch.compile(model, backend="deeppcr") reads such models'
        )

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value = obj.node.meta.get("example_value")
        if isinstance(value, (Tensor, tuple, list)):
            return iter([obj[index] for index in range(len(value))])
        return super().iter(obj)


class _KnownProxy(fx.Proxy):
    """A proxy that answers questions about shape, dtype and device with what it knows, and not with more graph."""

    def _known(self) -> Any:
        return self.node.meta.get("example_value")

    def __getattribute__(self, name: str) -> Any:
        if name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "layout"):
            value = object.__getattribute__(self, "node").meta.get("example_value")
            if isinstance(value, Tensor):
                return getattr(value, name)
        return super().__getattribute__(name)

    def size(self, dim: int | None = None) -> Any:
        return self._known().size() if dim is None else self._known().size(dim)

    def dim(self) -> int:
        return self._known().dim()

    def numel(self) -> int:
        return self._known().numel()

    def is_floating_point(self) -> bool:
        return self._known().is_floating_point()

    def __len__(self) -> int:
        return len(self._known())


def _frozen(value: Any) -> Any:
    """A hashable stand-in: equal for arguments that give results of equal shape."""
    if isinstance(value, Tensor):
        return id(value)
    if isinstance(value, (tuple, list)):
        return type(value).__name__, *map(_frozen, value)
    if isinstance(value, Mapping):
        return tuple((name, _frozen(item)) for name, item in value.items())
    if isinstance(value, slice):
        return "slice", _frozen(value.start), _frozen(value.stop), _frozen(value.step)
    hash(value)
    return type(value), value


def attribute(root: nn.Module, path: str) -> Any:
    """`root.a.b.c`, past `Module.__getattr__`, which a tracer at work has replaced."""
    *modules, name = path.split(".")
    for module in modules:
        root = root._modules[module] if module in root._modules else root.__dict__[module]  # type: ignore[assignment]
    for holder in (root._parameters, root._buffers, root._modules, root.__dict__):
        if name in holder:
            return holder[name]
    return getattr(root, name)


def _user_line(frame: FrameType | None) -> str:
    """The innermost line outside PyTorch and pcr_fx, in the form of a traceback."""
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_OWN_PACKAGES) and os.sep + "torch" + os.sep not in name:
            return f'  File "{name}", line {frame.f_lineno}, in {frame.f_code.co_name}\n'
        frame = frame.f_back
    return ""
