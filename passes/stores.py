"""What a forward stores where the next call or others find it: in its modules, in modules of Python, in closures."""

from __future__ import annotations

import dis
import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from pcr_fx.errors import CaptureError
from pcr_fx.passes.contents import LASTING
from pcr_fx.passes.open_sizes import closed
from pcr_fx.passes.places import ABSENT, CONTENTS
from pcr_fx.passes.shapes import Sizes

_NUMBERS = (int, float, complex)


class Store:
    """An op that stores a value as the forward did: its inputs are the tensors in that, all else is known.

    Args:
        put: what stores it.
    """

    __module__, __name__ = __name__, "store"

    def __init__(self, put: Callable[[Any], None], leaves: list[Any], spec: pytree.TreeSpec) -> None:
        self.put, self.leaves, self.spec = put, leaves, spec

    def __call__(self, *tensors: Any) -> None:
        waiting = iter(tensors)
        self.put(pytree.tree_unflatten([next(waiting) if one is ABSENT else one for one in self.leaves], self.spec))


@dataclass(frozen=True)
class Place:
    """Where something was stored.

    Attributes:
        kept_by: a module, a module of Python, or a closure; its id is one as long as this is kept.
        holder: its names.
        before: what stood there.
    """

    kept_by: Any
    holder: MutableMapping[str, Any]
    name: str
    before: Any

    @property
    def key(self) -> tuple[int, str]:
        return id(self.kept_by), self.name

    @property
    def module(self) -> nn.Module | None:
        return self.kept_by if isinstance(self.kept_by, nn.Module) else None

    @property
    def now(self) -> Any:
        return self.holder.get(self.name, ABSENT)

    def put_back(self) -> None:
        if self.before is ABSENT:
            self.holder.pop(self.name, None)
        else:
            self.holder[self.name] = self.before

    def putter(self, is_read: bool) -> Callable[[Any], None]:
        """What stores a value here. What nobody reads is stored past all that counts changes."""
        module, name, holder = self.module, self.name, self.holder
        if module is not None and (
            is_read or type(module).__setattr__ is not nn.Module.__setattr__ or _is_special(module, name)
        ):
            return lambda value: setattr(module, name, value)
        return lambda value: holder.__setitem__(name, value)

    def __str__(self) -> str:
        return self.name if self.module is None else f"{type(self.module).__name__}.{self.name}"


def _is_special(module: nn.Module, name: str) -> bool:
    return hasattr(type(module), name) or any(name in module.__dict__[place] for place in CONTENTS)


class Stores:
    """Finds what was stored since it last looked."""

    def __init__(self) -> None:
        self.attributes: dict[int, dict[str, Any]] = {}
        self.names: dict[tuple[int, str], Place] = {}

    def begin(self, modules: Iterable[nn.Module]) -> None:
        """What these modules have now was not stored by the forward."""
        self.attributes = {id(module): dict(module.__dict__) for module in modules}

    def watch(self, holder: MutableMapping[str, Any], kept_by: Any, name: str) -> None:
        """Look at a name outside modules as well."""
        self.names.setdefault((id(kept_by), name), Place(kept_by, holder, name, holder.get(name, ABSENT)))

    def in_modules(self, modules: Iterable[nn.Module]) -> Iterator[Place]:
        for module in modules:
            held, before = module.__dict__, self.attributes.setdefault(id(module), {})
            if len(held) == len(before) and all(map(operator.is_, held.values(), before.values())):
                continue
            changed = [name for name, value in held.items() if before.get(name, ABSENT) is not value]
            places = [Place(module, held, name, before.get(name, ABSENT)) for name in changed]
            self.attributes[id(module)] = dict(held)
            yield from places

    def elsewhere(self) -> Iterator[Place]:
        return (place for place in self.names.values() if place.now is not place.before)

    def put_back(self) -> None:
        """Have the names outside modules stand for what they stood for."""
        for place in self.elsewhere():
            place.put_back()


def buffers_set(modules: Iterable[nn.Module]) -> Iterator[Place]:
    """The buffers for which the forward keeps another tensor."""
    for module in modules:
        for name, now in dict.items(module._buffers):
            if isinstance(now, fx.Proxy) and now.node.op != "get_attr":
                yield _Buffer(module, module._buffers, name, now)


class _Buffer(Place):
    def putter(self, is_read: bool) -> Callable[[Any], None]:
        return functools.partial(setattr, self.module, self.name)


def store_of(place: Place, is_read: bool, advice: str) -> tuple[Store, list[fx.Node]] | None:
    """The op that stores what was stored at a place, and its inputs; nothing where it is not of tensors and constants alone.

    Raises:
        CaptureError: it is a number that evolves from call to call.
    """
    now, before = closed(place.now), place.before
    if before is ABSENT and place.module is not None:
        before = inspect.getattr_static(type(place.module), place.name, ABSENT)
    if _is_number(before) and _is_number(now) and is_read and now != before:
        raise CaptureError(f"the model keeps {place} from call to call: it reads it and changes it; {advice}")
    leaves, spec = pytree.tree_flatten(now, is_leaf=lambda leaf: isinstance(leaf, Sizes))
    leaves = [leaf.whole() if isinstance(leaf, Sizes) else leaf for leaf in leaves]
    if not all(isinstance(leaf, (*LASTING, torch.Size, fx.Proxy)) for leaf in leaves):
        return None
    nodes = [leaf.node for leaf in leaves if isinstance(leaf, fx.Proxy)]
    known = [ABSENT if isinstance(leaf, fx.Proxy) else leaf for leaf in leaves]
    return Store(place.putter(is_read), known, spec), nodes


def _is_number(value: Any) -> bool:
    return isinstance(value, _NUMBERS) and not isinstance(value, bool)


def names_stored(function: FunctionType) -> tuple[set[str], set[str], set[str]]:
    """The global names that a function stores to, those that it reads, and the names of its closure that it stores to."""
    stored, read, cells = set[str](), set[str](), set[str]()
    pending: list[CodeType] = [function.__code__]
    while pending:
        code = pending.pop()
        pending += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        for step in dis.get_instructions(code):
            if step.opname == "STORE_GLOBAL":
                stored.add(step.argval)
            elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                read.add(step.argval)
            elif step.opname == "STORE_DEREF" and step.argval in function.__code__.co_freevars:
                cells.add(step.argval)
    return stored, read, cells
