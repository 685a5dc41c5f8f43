"""What a forward that is traced gets in place of its tensors: stand-ins, which answer and record what it asks and does."""

from __future__ import annotations

import builtins
import functools
import inspect
import operator
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FrameType, FunctionType, MethodType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from pcr_fx.errors import CaptureError
from pcr_fx.graphs.hooks import TensorHook
from pcr_fx.locks import fork_safe_lock
from pcr_fx.passes.open_sizes import OpenSize

ADVICE = 'torch.compile(model, backend="deeppcr") reads such models'
_PASSES = os.path.dirname(__file__) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
# What a fake tensor knows.
KNOWN = frozenset(
    "shape dtype device ndim is_cuda is_mkldnn is_nested is_quantized is_sparse layout itemsize nbytes".split()
)
TENSOR_PROPERTIES = frozenset("T mT H mH real imag data".split())


class StandIn(fx.Proxy):
    """A proxy that is taken for a tensor by who asks (`lenient`), and records writes as what they are."""

    _is_param = _is_buffer = False

    def stands_for_tensor(self) -> bool:
        """Whether the model may take it for a tensor; without example inputs that is not known of what it asks of shapes."""
        value = self.node.meta.get("example_value", Tensor)
        return isinstance(value, Tensor) or (value is Tensor and not self.node.meta.get("may_be_number"))

    def __getattr__(self, name: str) -> Any:
        attribute = super().__getattr__(name)
        if name in TENSOR_PROPERTIES:
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return attribute

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "requires_grad" and isinstance(value, bool):
            self.tracer.create_proxy("call_method", "requires_grad_", (self, value), {})
        elif hasattr(Tensor, name):
            line = user_line(sys._getframe(1))
            raise CaptureError(f"the model sets {name} of a tensor{at(line)}; {ADVICE}")
        else:
            super().__setattr__(name, value)

    def register_hook(self, hook: Any) -> Any:
        """The op that does so; `hook` is kept as it is."""
        if not _lasts(hook):
            line = user_line(sys._getframe(1))
            raise CaptureError(f"a hook uses what the forward made{at(line)}, which each call makes anew; {ADVICE}")
        return self.tracer.create_proxy("call_function", TensorHook(hook), (self,), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _lasts(hook: Any) -> bool:
    """Whether a hook may be kept from one call to the next: what it holds are modules, functions and constants."""
    if isinstance(hook, MethodType):
        return isinstance(hook.__self__, nn.Module)
    if isinstance(hook, FunctionType):
        held = [cell.cell_contents for cell in hook.__closure__ or ()]
        held += [*(hook.__defaults__ or ()), *(hook.__kwdefaults__ or {}).values()]
        return all(isinstance(one, nn.Module) or _lasts(one) for one in held)
    if isinstance(hook, functools.partial):
        return all(map(_lasts, (hook.func, *hook.args, *hook.keywords.values())))
    return isinstance(hook, type | BuiltinFunctionType | int | float | str | None)


def _record_inplace(name: str) -> None:
    def method(self: StandIn, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    setattr(StandIn, f"__{name}__", method)


_IN_PLACE_NAMES = "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor".split()
IN_PLACE = frozenset(f"__{name}__" for name in _IN_PLACE_NAMES)
for _name in _IN_PLACE_NAMES:
    _record_inplace(_name)


class KnownStandIn(StandIn):
    """A proxy that answers questions about shape, dtype and device with what it knows, and not with more graph."""

    def __getattribute__(self, name: str) -> Any:
        if name in KNOWN and isinstance(value := self.node.meta.get("example_value"), Tensor):
            questions = self.tracer.questions  # type: ignore[attr-defined]
            if name == "shape":
                return questions.sizes(self.node, value.shape)
            return questions.ask("call_function", getattr, (self.node, name), {}, getattr(value, name))
        if name == "requires_grad" and (answer := self.tracer.requires_grad(self.node)) is not None:  # type: ignore[attr-defined]
            return answer
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        # Libraries ask a tensor whether it is one of theirs: `hasattr(value, "jax")`.
        value = self.node.meta.get("example_value")
        if isinstance(value, Tensor) and not hasattr(value, name):
            raise AttributeError(f"{type(value).__name__!r} object has no attribute {name!r}")
        attribute = super().__getattr__(name)
        if isinstance(inspect.getattr_static(type(value), name, None), property) and not isinstance(value, Tensor):
            _ = attribute.node  # computed now, and not where it is first used
        return attribute

    def __float__(self) -> float:
        return float(self.tracer.number(self))  # type: ignore[attr-defined]

    def __int__(self) -> int:
        return int(self.tracer.number(self))  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return self.tracer.questions.length(self.node, self.node.meta["example_value"])  # type: ignore[attr-defined]


def may_be_number(node: fx.Node) -> bool:
    """Whether a value of an unknown kind comes of a property that is no tensor, by way of Python's own operators."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "item", "stride", "nelement", "ndimension", "__len__")
    if node.target is getattr:
        return node.args[1] not in TENSOR_PROPERTIES
    is_operator = node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator"
    return is_operator and any(given.meta.get("may_be_number") for given in node.all_input_nodes)


class _Recording:
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        """`Function.apply` during a trace, as code in its place: with the same globals, and the cell that its `super` needs."""
        from pcr_fx.passes import stand_ins

        _ = __class__  # type: ignore[name-defined]
        return stand_ins._record_call(cls, *args, **kwargs)


_isinstance = isinstance
_function: FunctionType = torch.autograd.Function.__dict__["apply"].__func__
_code = _function.__code__
_apply = FunctionType(_code, _function.__globals__, "apply", None, _function.__closure__)
_checkpoint = torch.utils.checkpoint._checkpoint_without_reentrant_generator
_lenient_traces = 0
_lenient_lock = fork_safe_lock()


@contextmanager
def lenient() -> Iterator[None]:
    """Have Python take stand-ins for tensors, and functions with derivatives of their own be recorded when they get some.

    PyTorch itself must not take them for tensors: it would read memory that they do not have.
    """
    global _lenient_traces
    with _lenient_lock:
        _lenient_traces += 1
        builtins.isinstance = _is_or_stands_for
        # Its code, and not itself: models keep it bound, as in `spike = Spike.apply`.
        _function.__code__ = _Recording.apply.__code__
        torch.utils.checkpoint._checkpoint_without_reentrant_generator = _record_checkpoint  # type: ignore[assignment]
    try:
        yield
    finally:
        with _lenient_lock:
            _lenient_traces -= 1
            if not _lenient_traces:
                builtins.isinstance = _isinstance
                _function.__code__ = _code
                torch.utils.checkpoint._checkpoint_without_reentrant_generator = _checkpoint


def _is_or_stands_for(value: Any, kinds: Any) -> bool:
    if type(value) is OpenSize:
        return kinds is OpenSize or issubclass(int, kinds)
    if _isinstance(value, kinds):
        return True
    return type(value) in (StandIn, KnownStandIn) and value.stands_for_tensor() and issubclass(Tensor, kinds)


def _record_call(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """The op that calls a function with a derivative of its own."""
    found = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy)]
    if not found:
        return _apply(cls, *args, **kwargs)
    return found[0].tracer.call_with_derivative(cls, args, kwargs)  # type: ignore[attr-defined]


def _record_checkpoint(function: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
    """What `checkpoint` does before and after it calls a function: the ops are to be known as those of a checkpoint."""
    found = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy)]
    if not found:
        yield from _checkpoint(function, *args, **kwargs)
        return
    with found[0].tracer.in_checkpoint():  # type: ignore[attr-defined]
        yield


def at(line: str) -> str:
    return f" at {line.strip()}" if line else ""


def user_line(frame: FrameType | None) -> str:
    """The innermost line of the model's own code, in the form of a traceback."""
    while frame is not None:
        name = frame.f_code.co_filename
        is_own = name.startswith(_PASSES)
        if is_own and frame.f_code.co_name == "trace":
            break  # where the trace began
        if not is_own and not name.startswith(_TORCH):
            return f'  File "{name}", line {frame.f_lineno}, in {frame.f_code.co_name}\n'
        frame = frame.f_back
    return ""
