"""Values that may change though they are the same objects: what is in them, in a form that can be compared later."""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

# Values that never change. Any other may be another one although it is the same object.
LASTING = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
# An object with more in it than this is a world of its own, such as a trainer, of which a forward reads next to nothing.
_MOST_ITEMS = 2000


def describe_lasting(value: Any) -> Any:
    return (float, value.hex()) if type(value) is float else (type(value), value)  # 0.0 is not -0.0, and NaN is NaN


def items_in(value: Any) -> list[Any]:
    """Everything in a value and in what is in it."""
    described = _Description()
    described.of(value)
    return [item for view in described.views for item in view]


def copies_of(value: Any) -> list[tuple[Any, Any]]:
    """The containers in a value that can be written to, each with a copy, for `put_back`."""
    described = _Description()
    described.of(value)
    return described.copies


def put_back(container: Any, copy: Any) -> None:
    """Have a container hold again what its copy holds, past methods of its own, which may refuse to be written to."""
    if _holds_the_same(container, copy):
        return
    kind: Any = next(one for one in (list, deque, set, OrderedDict, dict) if isinstance(container, one))
    kind.clear(container)
    if isinstance(container, dict):
        for key, value in copy.items():
            kind.__setitem__(container, key, value)
    elif isinstance(container, set):
        set.update(container, copy)
    else:
        kind.extend(container, copy)


def _holds_the_same(container: Any, copy: Any) -> bool:
    """Whether there are the same objects in the same order."""
    if len(container) != len(copy):
        return False
    if isinstance(container, dict):
        pairs = zip(dict.items(container), copy.items(), strict=True)
        return all(key is other and value is known for (key, value), (other, known) in pairs)
    return all(map(operator.is_, container, copy))


def only_grew(container: Any, copy: Any, evolves: Callable[[Any], bool]) -> bool:
    """Whether a container holds all that its copy holds, and beside that keys or elements of which none evolves."""
    if isinstance(container, dict):
        new = [value for key, value in container.items() if key not in copy]
        return all(container.get(key, copy) is value for key, value in copy.items()) and not any(map(evolves, new))
    return copy <= container if isinstance(container, set) else list(map(id, container)) == list(map(id, copy))


def describe(value: Any, views: list[Any] | None = None, arrays: list[tuple[Any, Any]] | None = None) -> Any:
    """A value in a form that is equal for values that a forward cannot tell apart.

    Args:
        views: gets the containers met on the way, each as something that runs through its present items.
        arrays: gets NumPy's arrays, each with a copy.
    """
    described = _Description()
    result = described.of(value)
    if described.count > _MOST_ITEMS:
        return "is", id(value)
    if views is not None:
        views += described.views
    if arrays is not None:
        arrays += described.arrays
    return result


class _Description:
    def __init__(self) -> None:
        self.views: list[Any] = []
        self.arrays: list[tuple[Any, Any]] = []
        self.copies: list[tuple[Any, Any]] = []
        self.seen: dict[int, Any] = {}
        self.count = 0

    def of(self, value: Any) -> Any:
        if isinstance(value, LASTING) and type(value) in LASTING:
            return describe_lasting(value)
        if id(value) in self.seen:
            return "again", self.seen[id(value)]
        self.count += 1
        if self.count > _MOST_ITEMS:
            return None
        self.seen[id(value)] = len(self.seen)
        if isinstance(value, np.ndarray) and value.dtype != object:
            self.arrays.append((value, value.copy()))
            return np.ndarray, value.shape, value.dtype, value.tobytes()
        if isinstance(value, functools.partial):
            return functools.partial, self.of(value.func), self.of(value.args), self.of(value.keywords)
        if isinstance(value, Mapping) and isinstance(value, dict):
            return type(value), self._items(value), self._inner(value)
        if isinstance(value, (list, tuple, deque, set, frozenset)):
            self.views.append(value)
            if type(value) in (list, set, deque):
                self.copies.append((value, value.copy()))
            items = (
                sorted(map(repr, map(self.of, value)))
                if isinstance(value, (set, frozenset))
                else list(map(self.of, value))
            )
            return type(value), items, self._inner(value)
        if _is_plain_object(value):
            return type(value), self._inner(value)
        return "is", id(value)

    def _items(self, value: dict[Any, Any]) -> list[Any]:
        self.views += [value.keys(), value.values()]
        self.copies.append((value, dict(dict.items(value))))  # past methods of its own, which may make things
        return [(self.of(key), self.of(item)) for key, item in list(value.items())]

    def _inner(self, value: Any) -> Any:
        """What an object keeps in attributes."""
        held = getattr(value, "__dict__", None)
        names = [name for kind in type(value).__mro__ for name in _slots(kind)]
        slots = [(name, self.of(getattr(value, name, None))) for name in names]
        return (self._items(held) if isinstance(held, dict) else None), slots


def _slots(kind: type) -> list[str]:
    slots = kind.__dict__.get("__slots__", ())
    return [slots] if isinstance(slots, str) else [name for name in slots if not name.startswith("__")]


def _is_plain_object(value: Any) -> bool:
    """Whether it is an object of a class written in Python, such as a configuration, and no module, function or tensor."""
    if isinstance(value, (Tensor, nn.Module, type, fx.Proxy)) or callable(getattr(value, "__get__", None)):
        return False
    package = type(value).__module__.partition(".")[0]
    has_attributes = hasattr(value, "__dict__") or any(_slots(kind) for kind in type(value).__mro__)
    return has_attributes and package not in ("torch", "logging", "threading", "builtins", "weakref", "pcr_fx")
