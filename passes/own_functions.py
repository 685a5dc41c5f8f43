"""Functions with derivatives of their own, as a trace records them: `torch.autograd.Function`."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction

from pcr_fx.errors import CaptureError
from pcr_fx.graphs.parts import HOLE, own_function
from pcr_fx.passes.open_sizes import closed
from pcr_fx.passes.stand_ins import ADVICE, at, user_line


def record_call(tracer: Any, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The op that calls `function`, a class, with stand-ins among its arguments.

    Raises:
        CaptureError: it does more than compute, or that cannot be told.
    """
    if function is CheckpointFunction:
        computed, _, *given = args
        with tracer.in_checkpoint():
            return computed(*given)
    refusal = f"{function.__name__}{at(user_line(sys._getframe(3)))} has derivatives of its own, which are not read"
    args, kwargs = closed((args, kwargs))
    tensors = [one for one in args if _is_tensor(one)]
    nested = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if _is_tensor(leaf)]
    if tracer.values is None:
        raise CaptureError(f"{refusal} without example inputs; {ADVICE}")
    if kwargs or len(nested) != len(tensors):
        raise CaptureError(f"{refusal}; {ADVICE}")
    tracer.read.uses(function)
    op = own_function(function, [HOLE if _is_tensor(one) else one for one in args])
    with _Effects() as effects:
        try:
            result = tracer.create_proxy("call_function", op, tuple(tensors), {})
        except Exception as error:
            raise CaptureError(f"{refusal}: {error}; {ADVICE}") from error
    if effects.found or "mark_dirty" in _names_in(function):
        raise CaptureError(f"{refusal}: it {effects.found or 'writes to its inputs'}; {ADVICE}")
    return result


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (fx.Proxy, Tensor))


def _names_in(function: Any) -> set[str]:
    """What the forward of a `torch.autograd.Function` calls by name."""
    codes = (getattr(getattr(function, name), "__code__", None) for name in ("forward", "setup_context"))
    return {name for code in codes if code is not None for name in code.co_names}


class _Effects(TorchDispatchMode):
    """Notices ops that draw random numbers, or write to what was not made while it watches.

    Attributes:
        found: what was noticed, in words.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = ""
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.found = "draws random numbers"
        given = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | (kwargs or {})
        for declared in func._schema.arguments:
            is_write = declared.alias_info is not None and declared.alias_info.is_write
            if is_write and any(_memory(one) not in self.made for one in _tensors(given.get(declared.name))):
                self.found = "writes to its inputs"
        result = func(*args, **(kwargs or {}))
        if not any(one.alias_info is not None for one in func._schema.returns):
            self.made |= {_memory(one) for one in _tensors(result)}
        return result


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
