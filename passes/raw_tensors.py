"""Ops of tensors that a trace has handed out no stand-in for: parameters found elsewhere, constants, tensors out of nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pcr_fx.graphs.effects import is_random_name
from pcr_fx.passes.open_sizes import closed
from pcr_fx.passes.shapes import UNKNOWN, whole_shapes
from pcr_fx.passes.stand_ins import IN_PLACE, KNOWN

# Tensors out of nothing: each call of the model makes its own.
_FACTORIES = frozenset(
    getattr(torch, name)
    for name in [
        "arange",
        "as_tensor",
        "empty",
        "eye",
        "full",
        "linspace",
        "logspace",
        "normal",
        "ones",
        "rand",
        "randint",
        "randn",
        "randperm",
        "scalar_tensor",
        "tensor",
        "tril_indices",
        "triu_indices",
        "zeros",
    ]
)
# Methods that answer from shape and dtype alone.
_SHAPE_METHODS = frozenset(
    """__len__ dim element_size get_device is_complex is_contiguous is_floating_point is_signed ndimension nelement numel size
    storage_offset stride""".split()
)


class RawTensors(TorchFunctionMode):
    """Has the tracer record what it would not see otherwise: ops of tensors that it has handed out no stand-in for."""

    def __init__(self, tracer: Any) -> None:
        super().__init__()
        self.tracer = tracer
        # Results of ops that were run, by their ids.
        self.computed: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _asks_for_shape(func):
            self.tracer.read.asks_for_shape()
            return func(*args, **(kwargs or {}))
        args, kwargs = whole_shapes((args, kwargs or {}))
        if func in _FACTORIES:
            return self.tracer.create_proxy("call_function", func, args, kwargs)
        args, kwargs = closed((args, kwargs))
        if any(issubclass(kind, fx.Proxy) for kind in types):
            return func(*args, **kwargs)
        raw = _tensors((args, kwargs))
        if not raw:
            return func(*args, **kwargs)
        if self._is_live(func, raw):
            args, kwargs = pytree.tree_map_only(Tensor, self.tracer.constant, (args, kwargs))
            return fx.Proxy.__torch_function__(func, (), args, kwargs)
        return self._compute(func, raw, args, kwargs)

    def _is_live(self, func: Any, raw: list[Tensor]) -> bool:
        """Whether what an op computes may be another at each call, or whether it writes into what is not of this trace."""
        name = func.__name__
        if any(id(tensor) in self.tracer.names or tensor.requires_grad for tensor in raw) or is_random_name(name):
            return True
        is_write = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name in IN_PLACE
        return is_write and id(raw[0]) not in self.computed

    def _compute(self, func: Any, raw: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Run an op, whose result is part of the graph as long as nobody writes into these tensors."""
        for tensor in raw:
            if id(tensor) not in self.computed:
                self.tracer.read.computes_with(tensor)
        result = func(*args, **kwargs)
        self.computed |= {id(tensor): tensor for tensor in _tensors(result)}
        return result


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _asks_for_shape(func: Any) -> bool:
    """Whether a method or property of tensors reads no values."""
    name = func.__name__
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        return name in KNOWN or name in UNKNOWN
    return name in _SHAPE_METHODS
