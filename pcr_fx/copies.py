"""Copies of a model: with parameters of its own, or of the tree of modules alone."""

from __future__ import annotations

import copy
import functools
import operator
from collections import OrderedDict
from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from pcr_fx.watched import copied


def copy_model(model: nn.Module) -> tuple[nn.Module, dict[int, Any]]:
    """A model with parameters of its own, which keep their hooks; and the copy of whatever was copied, by its `id`."""
    # What hooks compute from parameters, such as a normalised weight, is computed anew at each call.
    computed = [
        v for module in model.modules() for v in module.__dict__.values() if isinstance(v, Tensor) and not v.is_leaf
    ]
    copies: dict[int, Any] = {id(value): value.detach().clone() for value in computed}
    copied = copy.deepcopy(model, copies)
    for ours, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        for hook in (theirs._backward_hooks or {}).values():
            ours.register_hook(hook)
        for hook in (theirs._post_accumulate_grad_hooks or {}).values():
            ours.register_post_accumulate_grad_hook(hook)
    return copied, copies


def copy_structure(model: nn.Module) -> nn.Module:
    """The module tree anew, with the same parameters, buffers and other attributes in it, and with hooks of the copies' own."""
    copies: dict[int, nn.Module] = {}
    for module in model.modules():
        kind = _own_class(module)
        copies[id(module)] = object.__new__(kind)
    for module in model.modules():
        copies[id(module)].__dict__.update(
            (name, copied(name, _of_copies(value, copies, name))) for name, value in module.__dict__.items()
        )
    return copies[id(model)]


def _own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a copy. A parametrized module has one of its own, which PyTorch changes with the module."""
    kind = type(module)
    if not parametrize.is_parametrized(module):
        return kind
    held = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, kind.__bases__, held)


def _of_copies(value: Any, copies: Mapping[int, nn.Module], name: str = "") -> Any:
    """An attribute of a module as it is in a copy: about the copies where it was about the modules."""
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _of_copies(value.__self__, copies))
    if type(value) is functools.partial:
        args, keywords = _of_copies(value.args, copies), _of_copies(value.keywords, copies)
        other = functools.partial(_of_copies(value.func, copies), *args, **keywords)
        other.__dict__.update(value.__dict__)
        return other
    is_own = name.startswith("_") and isinstance(value, (dict, set))
    if not is_own and type(value) not in (list, tuple, dict, OrderedDict):
        return value
    items = value.values() if isinstance(value, dict) else value
    renewed_items = [_of_copies(item, copies) for item in items]
    if not is_own and all(map(operator.is_, items, renewed_items)):
        return value
    if isinstance(value, dict):
        renewed = value.copy()
        for key, item in zip(value, renewed_items, strict=True):
            renewed[key] = item
        return renewed
    return type(value)(renewed_items)
