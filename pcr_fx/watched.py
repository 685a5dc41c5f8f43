"""The dicts that modules keep things in, made to count: so that a call need not look through thousands of modules.

A module's parameters, buffers, submodules and hooks are in dicts of its own. What it keeps otherwise is in `__dict__`, which
counts nothing; but `nn.Module` asks the dict of submodules whether a name is there before it sets or deletes such an
attribute, and that is counted as well.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils.hooks import RemovableHandle

from pcr_fx.errors import UnsupportedError


class Changes:
    """How often, so far, anything that is watched may have changed.

    Attributes:
        count: other objects may stand in it.
        listings: somebody went through parameters, and may have put other data into each. Every step of a training loop does
            that, to clip gradients, say, so that a look after it has to be cheap.
    """

    def __init__(self) -> None:
        self.count = self.listings = 0


@dataclass(frozen=True)
class Part:
    """A parameter that is one index of another, which a module keeps elsewhere.

    Attributes:
        holder, name: where that one is kept.
    """

    holder: Mapping[str, Tensor]
    name: str
    index: int

    def __call__(self) -> Tensor:
        view = self.holder[self.name][self.index]
        if torch.compiler.is_compiling() or type(view) is not Tensor or is_functorch_wrapped_tensor(view):
            return view  # a compiler's, or a transform's
        part = view.as_subclass(PartTensor)
        part.place = self
        return part

    @property
    def shape(self) -> torch.Size:
        return self.holder[self.name].shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        return self.holder[self.name].dtype

    @property
    def device(self) -> torch.device:
        return self.holder[self.name].device


class PartTensor(Tensor):
    """A view of a packed parameter, of which hooks and gradient are the parameter's: they would be lost with a view."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _is_param = True  # who looks for one takes it for an `nn.Parameter`
    place: Part

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        """This part of the gradient."""
        gradient = self._packed.grad
        return None if gradient is None else gradient[self.place.index]

    @grad.setter
    def grad(self, value: Any) -> None:
        if value is not None:
            raise UnsupportedError(f"the gradient is part of that of {self.place.name}: write into it, or set that one")
        if self.grad is not None:
            self.grad.zero_()

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """As the packed parameter; it is not another for a part."""
        return Tensor.requires_grad.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if bool(value) != self._packed.requires_grad:
            raise UnsupportedError(
                f"it is part of the packed parameter {self.place.name}, which requires gradients as a whole or not at all: freeze "
                "that one, or freeze blocks of the model before it is transformed, which are not packed with others then"
            )

    def requires_grad_(self, requires_grad: bool = True) -> PartTensor:
        """As setting `requires_grad`."""
        self.requires_grad = requires_grad
        return self

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        """As of any tensor; no other module registers it as a parameter of its own."""
        if sys._getframe(1).f_code is nn.Module.register_parameter.__code__:
            raise UnsupportedError(
                f"this is part of the packed parameter {self.place.name}, and cannot be one of another module"
            )
        return Tensor.grad_fn.__get__(self)  # type: ignore[attr-defined]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """As of any tensor; it is not exchanged for another."""
        return Tensor.data.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @data.setter
    def data(self, value: Any) -> None:
        raise UnsupportedError(f"it is part of the packed parameter {self.place.name}: write into it (copy_)")

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """As of any tensor: `hook` gets this part of the gradient, and may return another."""

        def of_part(gradient: Tensor) -> Tensor | None:
            changed = hook(gradient[self.place.index])
            if changed is None:
                return None
            gradient = gradient.clone()
            gradient[self.place.index] = changed
            return gradient

        return self._packed.register_hook(of_part)

    def register_post_accumulate_grad_hook(self, hook: Callable[[Tensor], None]) -> RemovableHandle:
        """Calls `hook` with this part as soon as the gradient of the packed parameter is complete."""
        return self._packed.register_post_accumulate_grad_hook(lambda _: hook(self.place()))

    @property
    def _packed(self) -> Tensor:
        return self.place.holder[self.place.name]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


class Watched(dict[Any, Any]):
    """Parameters, buffers or submodules, each by its name.

    Attributes:
        watchers: who counts the changes.
    """

    watchers: tuple[weakref.ref[Changes], ...] = ()

    def __reduce__(self) -> Any:
        return type(self), (dict(dict.items(self)),), {**self.__dict__, "watchers": ()}


class _Here(threading.local):
    """Of this thread: how many conversions of whole models are under way."""

    conversions = 0


_here = _Here()
# PyTorch does not say for whom it goes through parameters, or asks for a submodule: it is seen by what is running.
_CONVERTING, _LISTING = nn.Module._apply.__code__, nn.Module._named_members.__code__
_GETTING = nn.Module.__getattr__.__code__
_WITH_PACKED, _WITHOUT_PACKED = object(), object()


@contextlib.contextmanager
def converting() -> Iterator[None]:
    """While a whole model is converted or moved, its packed parameters with it."""
    _here.conversions += 1
    try:
        yield
    finally:
        _here.conversions -= 1


class Parameters(Watched):
    """Parameters. Whoever goes through them may put other data into each: by `.data`, or as `Module._apply` does.

    Attributes:
        parts: parameters that are kept elsewhere. They are found here when they are asked for by name, and are among the items
            where those of a part of the model are listed that does not have the ones they are kept in.
    """

    parts: Mapping[str, Part] = {}

    def items(self) -> Any:
        asker = sys._getframe(1)
        if asker.f_code is _CONVERTING:
            _count(self)
        else:
            _count_listing(self)
        if not self.parts:
            return super().items()
        if asker.f_code is _CONVERTING and not _here.conversions:
            raise UnsupportedError(
                f"{', '.join(self.parts)} of this module are parts of packed parameters, which are converted and moved as a whole: "
                "convert or move what transform returned"
            )
        listing = asker.f_back
        if listing is None or listing.f_code is not _LISTING or not self._is_listed_alone(listing.f_locals):
            return super().items()
        return {**dict(super().items()), **{name: part() for name, part in self.parts.items()}}.items()

    def _is_listed_alone(self, listing: dict[str, Any]) -> bool:
        """Whether what PyTorch goes through has this module, and not that which keeps the packed parameters.

        The own parameters of one module alone are listed by those who go through all modules themselves.
        """
        root, seen = listing["self"], listing["memo"]
        if not listing["recurse"] or _WITH_PACKED in seen:
            return False
        if _WITHOUT_PACKED not in seen:  # found out once a listing, and kept with it
            holder = next(iter(self.parts.values())).holder
            is_whole = any(module._parameters is holder for module in root.modules())
            seen.add(_WITH_PACKED if is_whole else _WITHOUT_PACKED)
        return _WITHOUT_PACKED in seen

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.parts

    def __missing__(self, name: str) -> Tensor:
        if name not in self.parts:
            raise KeyError(name)
        return self.parts[name]()

    def __setitem__(self, name: str, value: Any) -> None:
        self._refuse(name)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self._refuse(name)
        super().__delitem__(name)

    def _refuse(self, name: str) -> None:
        if name in self.parts:
            raise UnsupportedError(
                f"{name} is part of the packed parameter {self.parts[name].name}, and cannot be exchanged or removed by itself; "
                "write into it (copy_), load a state_dict, or change the model and transform it anew"
            )


class Children(Watched):
    """Submodules. Whoever asks whether one that is not there is there may be about to set another attribute of that name, but for
    `Module.__getattr__`, which has looked everywhere else.

    Attributes:
        aside: the names of those that are none of the model's own.
    """

    aside: tuple[str, ...] = ()

    def __contains__(self, name: object) -> bool:
        found = super().__contains__(name)
        if not found and sys._getframe(1).f_code is not _GETTING:
            _count(self)
        return found


class Hooks(OrderedDict[int, Any]):
    """Hooks of a module, by number."""

    watchers: tuple[weakref.ref[Changes], ...] = ()

    def __reduce__(self) -> Any:
        return type(self), (list(self.items()),)


def _count(values: Watched | Hooks) -> None:
    for watcher in values.watchers:
        changes = watcher()
        if changes is not None:
            changes.count += 1


def _count_listing(values: Parameters) -> None:
    for watcher in values.watchers:
        changes = watcher()
        if changes is not None:
            changes.listings += 1


def _make_counting(kind: type[Watched] | type[Hooks], name: str) -> None:
    method = getattr(kind, name)

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        finally:
            _count(self)  # afterwards: another thread may look in between

    counting.__name__ = name
    setattr(kind, name, counting)


for _name in ["__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"]:
    _make_counting(Watched, _name)
    _make_counting(Hooks, _name)
_make_counting(Hooks, "move_to_end")

_HOOKS = tuple(
    f"_{name}"
    for name in """forward_hooks forward_hooks_with_kwargs forward_hooks_always_called forward_pre_hooks
    forward_pre_hooks_with_kwargs backward_hooks backward_pre_hooks""".split()
)
_KINDS: dict[str, type[Watched] | type[Hooks]] = {
    "_parameters": Parameters,
    "_buffers": Watched,
    "_modules": Children,
    **dict.fromkeys(_HOOKS, Hooks),
}


def copied(name: str, values: Any) -> Any:
    """A copy of a module's attribute if it is one of those dicts, made to count; anything else as it is."""
    kind = _KINDS.get(name)
    return values if kind is None or not isinstance(values, dict) else kind(values)


def watch(root: nn.Module, changes: Changes) -> None:
    """Have everything that the modules of `root` keep count in `changes`.

    Hooks of a module that came with some stay where they are, since whoever may remove them knows that place: see `is_watched`.
    """
    for module in root.modules():
        held = module.__dict__
        for name in _KINDS:
            values = held.get(name)
            if type(values) in (dict, OrderedDict) and not (name in _HOOKS and values):
                held[name] = values = copied(name, values)
            if isinstance(values, (Watched, Hooks)) and all(watcher() is not changes for watcher in values.watchers):
                present = tuple(watcher for watcher in values.watchers if watcher() is not None)
                values.watchers = (*present, weakref.ref(changes))


def is_watched(module: nn.Module, changes: Changes) -> bool:
    """Whether everything that a module keeps counts in `changes`."""
    kept = (module.__dict__.get(name) for name in _KINDS)
    return all(
        isinstance(values, (Watched, Hooks)) and any(watcher() is changes for watcher in values.watchers)
        for values in kept
    )
