"""What a trace takes for granted of a model, recorded as the forward reads it, and whether it holds still.

What the modules of the model keep is looked at again only after something of it may have changed (`watched.py` counts that).
What is kept elsewhere, which nobody counts, is looked at at each call: classes, the contents of lists and objects, modules
outside the model, PyTorch's settings. There it is asked whether the very same objects stand where they stood, and only if
not, whether they are equal.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import operator
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from pcr_fx.errors import CaptureError
from pcr_fx.graphs.hooks import has_hooks
from pcr_fx.passes.contents import LASTING, copies_of, describe, describe_lasting, items_in
from pcr_fx.watched import Changes, Part, is_watched

# What every module has, beside the modes, is read by PyTorch itself. The first three are facts as a whole where they are read.
_CONTENTS = ("_modules", "_parameters", "_buffers")
_OWN = (frozenset(vars(nn.Module())) | frozenset(vars(nn.Module))) - {"training", "forward", *_CONTENTS}
_ABSENT = object()
# Tensors that a trace finds in no module are kept by the root under such names.
CONSTANT = "_tensor_constant"
_SETTINGS = """are_deterministic_algorithms_enabled get_autocast_cpu_dtype get_autocast_dtype get_autocast_gpu_dtype
get_default_dtype get_default_device is_autocast_cache_enabled is_autocast_cpu_enabled is_autocast_enabled is_grad_enabled
is_inference_mode_enabled""".split()
_ASKED = [getattr(torch, name) for name in _SETTINGS if hasattr(torch, name)]


_WRAPPERS = (
    (functools.partial, "func"),
    (MethodType, "__func__"),
    (property, "fget"),
    (classmethod, "__func__"),
    (staticmethod, "__func__"),
)


class Facts:
    """What one trace took for granted of its model.

    Args:
        read: how it was recorded.
        with_shapes: whether that includes shapes, dtypes and devices of parameters and buffers.
        changes: what counts the changes of the modules of the model.
    """

    def __init__(self, read: Reading, with_shapes: bool, changes: Changes) -> None:
        self.with_shapes, self.changes = with_shapes or read.asked_for_shapes, changes
        # Where changes are not counted, there is no knowing without looking.
        uncounted = {key for key, module in read.modules.items() if not is_watched(module, changes)}
        self._inside, self._outside = list[_Fact](), list[_Fact]()
        for module, name, value in read.attributes.values():
            facts = self._outside if id(module) in uncounted else self._inside
            facts.append((module.__dict__, _place(module, name, value), name, read.kept(value)))
        self._contents = list(read.contents.values())
        self._types = [(module, type(module)) for module in read.modules.values()]
        self._hooked = [(module, hooked) for module, hooked in read.hooked.values()]
        self._unwatched_hooks = [(module, hooked) for module, hooked in self._hooked if id(module) in uncounted]
        self._elsewhere = list(read.elsewhere.values())
        self._settings = list(read.settings.items())
        self._versions = list(read.versions.values())
        self._global_hooks = bool(_has_any_global_hook())
        self._described = read.described
        self._checked, self._held = changes.count, True
        self._look()

    def hold(self) -> bool:
        """Whether all is as it was."""
        count = self.changes.count
        if self._checked != count:
            self._held, self._has_looked = self._hold_inside(), False
            self._checked = count
        return self._held and self._hold_elsewhere()

    def _look(self) -> None:
        """Take down which objects stand where, for `_hold_elsewhere`."""
        self._seen = [(holder, name, holder.get(name, _ABSENT)) for holder, name, _ in self._elsewhere]
        views: list[Any] = []
        self._arrays: list[tuple[Any, Any]] = []
        present = [
            _find(held, place, name)
            for held, place, name, value in [*self._inside, *self._outside]
            if id(value) in self._described
        ]
        present += [
            now
            for (_, _, now), (_, _, value) in zip(self._seen, self._elsewhere, strict=True)
            if id(value) in self._described
        ]
        for value in {id(value): value for value in present}.values():
            describe(value, views, self._arrays)
        self._views = list({id(view): view for view in views}.values())
        self._sizes = list(map(len, self._views))
        self._items = list(itertools.chain.from_iterable(self._views))
        self._has_looked = True

    def _hold_inside(self) -> bool:
        return (
            all(type(module) is kind for module, kind in self._types)
            and all(has_hooks(module) == hooked for module, hooked in self._hooked)
            and all(_contents(module, name) == items for module, name, items in self._contents)
        )

    def _hold_elsewhere(self) -> bool:
        if bool(_has_any_global_hook()) != self._global_hooks:
            return False
        if self._settings and any(function(*given) != value for (function, given), value in self._settings):
            return False
        if self._versions and any(tensor._version != version for tensor, version in self._versions):
            return False
        if self._unwatched_hooks and any(has_hooks(module) != hooked for module, hooked in self._unwatched_hooks):
            return False
        if self._outside and not self._hold(self._outside):
            return False
        return self._is_unchanged() or self._look_again()

    def _is_unchanged(self) -> bool:
        """Whether the same objects stand where they stood, as far as that can change without being counted."""
        if not self._has_looked:
            return False
        try:
            # One by one, and nothing where there is nothing: this is most of what a call of a small model costs here.
            for holder, name, value in self._seen:
                if holder[name] is not value:
                    return False
            if self._views and not (
                list(map(len, self._views)) == self._sizes
                and all(map(operator.is_, itertools.chain.from_iterable(self._views), self._items))
            ):
                return False
            return not self._arrays or all(np.array_equal(array, copy) for array, copy in self._arrays)
        except (KeyError, RuntimeError):  # something is gone, or changes at this moment
            return False

    def _look_again(self) -> bool:
        """Whether other objects that stand there are equal to those that stood there; then they are the ones from now on."""
        held = (
            self._hold(self._inside)
            and self._hold(self._outside)
            and all(self._holds(holder.get(name, _ABSENT), value) for holder, name, value in self._elsewhere)
        )
        if held:
            self._look()
        return held

    def _hold(self, facts: Sequence[_Fact]) -> bool:
        for held, place, name, value in facts:
            if place is None and value is _ABSENT:
                if name in held:
                    return False
            elif not self._holds(_find(held, place, name), value):
                return False
        return True

    def _holds(self, now: Any, value: Any) -> bool:
        if isinstance(value, _Kept):
            return value.holds(now, self.with_shapes)
        if now is value and id(value) not in self._described:
            return True
        if isinstance(value, LASTING):
            return describe_lasting(now) == describe_lasting(value)
        described = self._described.get(id(value))
        return described is not None and describe(now) == described


# What a module holds, the place there, the name, and the value.
_Fact: TypeAlias = tuple[dict[str, Any], str | None, str, Any]


class _Kept:
    """A fact about a tensor, which this does not keep alive.

    Args:
        alone: whether any other may take its place.
    """

    def __init__(self, tensor: Tensor, alone: bool) -> None:
        self.spec = _spec(tensor)
        self.itself = None if alone else weakref.ref(tensor)

    def holds(self, now: Any, with_shapes: bool) -> bool:
        if not isinstance(now, (Tensor, Part)) or (self.itself is not None and self.itself() is not now):
            return False
        return not with_shapes or _spec(now) == self.spec


class Reading:
    """Records what is read of a model while it is traced.

    Attributes:
        before: what each module kept when that began.
        attributes: what was read of modules: the module, the name, and the value that stood there before.
        elsewhere: what was found in a class, in a module of Python or in a closure: the dict, the name, the value.
        contents: submodules, or the names of parameters or buffers, of modules that were asked for all.
        modules: every module that anything was read of.
        hooked: the modules that were called, each with whether it has hooks.
        settings: what was asked of PyTorch, and the answer.
        asked_for_shapes: whether the forward asked for the shape of a tensor other than its stand-ins.
        versions: tensors whose values were computed with, each with its version.
        described: the values of `attributes` and `elsewhere` that may change, as they were, by their ids.
        codes: the functions that were looked into.
        copies: the containers in what was read, each with a copy.
        tied: the ids of parameters and buffers that are in several places, of which a graph reads one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.before: dict[int, dict[str, Any]] = {}
        self.attributes: dict[tuple[int, str], tuple[nn.Module, str, Any]] = {}
        self.elsewhere: dict[tuple[int, str], tuple[Mapping[str, Any], str, Any]] = {}
        self.contents: dict[tuple[int, str], tuple[nn.Module, str, Any]] = {}
        self.modules: dict[int, nn.Module] = {}
        self.hooked: dict[int, tuple[nn.Module, bool]] = {}
        self.settings: dict[tuple[Callable[..., Any], tuple[Any, ...]], Any] = {}
        self.versions: dict[int, tuple[Tensor, int]] = {}
        self.described: dict[int, Any] = {}
        self.tied = _tied(model)
        self.copies: list[tuple[Any, Any]] = []
        self.codes: set[FunctionType] = set()
        self._listens = False
        self.asked_for_shapes = False
        for module in model.modules():
            self._keep(module)

    def _keep(self, module: nn.Module) -> dict[str, Any]:
        held = module.__dict__
        kept = {name: value for values in _CONTENTS[::-1] for name, value in (held.get(values) or {}).items()}
        self.before[id(module)] = kept | held
        return self.before[id(module)]

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """For the time of a trace, which must be the only one."""

        def get(module: nn.Module, name: str) -> Any:
            if self._listens and name not in _OWN and not name.startswith(("__", CONSTANT)):
                self._read(module, name)
            return object.__getattribute__(module, name)

        with contextlib.ExitStack() as stack:
            nn.Module.__getattribute__ = get  # type: ignore[method-assign,assignment]
            stack.callback(delattr, nn.Module, "__getattribute__")
            for name in _SETTINGS:
                asked = getattr(torch, name, None)
                if asked is not None:
                    setattr(torch, name, self._asking(asked))
                    stack.callback(setattr, torch, name, asked)
            yield

    def _asking(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def ask(*given: Any) -> Any:
            value = function(*given)
            if self._listens:
                self.settings[function, given] = value
            return value

        return ask

    @contextlib.contextmanager
    def listening(self, listens: bool) -> Iterator[None]:
        """Whether it is the forward that reads and asks from now on, or another."""
        before, self._listens = self._listens, listens
        try:
            yield
        finally:
            self._listens = before

    def _read(self, module: nn.Module, name: str) -> None:
        key = id(module), name
        if key in self.attributes:
            return
        self.modules[id(module)] = module
        if name in _CONTENTS:
            if key not in self.contents:
                self.contents[key] = module, name, _contents(module, name)
            return
        before = self.before.get(id(module)) or self._keep(module)
        value, now = before.get(name, _ABSENT), _attribute(module, name)
        if now is value or (
            isinstance(now, fx.Proxy) and isinstance(value, Tensor)
        ):  # else it is the forward's own doing
            self.attributes[key] = module, name, value
            self._describe(value)
            self._read_code(value)
        if value is _ABSENT:
            self._read_of_class(type(module), name)

    def _read_of_class(self, kind: type, name: str) -> None:
        owner = next((owner for owner in kind.__mro__ if name in owner.__dict__), None)
        if owner not in (None, nn.Module, object):
            self._note(owner.__dict__, name, owner)

    def _note(self, holder: Mapping[str, Any], name: str, kept_by: Any) -> None:
        """That a name stands for a value; of a function also for what it finds by the names in its code."""
        key = id(kept_by), name
        if key not in self.elsewhere:
            value = holder[name]
            self.elsewhere[key] = holder, name, value
            self._describe(value)
            self._read_code(value)

    def _read_code(self, function: Any) -> None:
        """Of a function of the model what it finds by the names in its code."""
        for kind, wrapped in _WRAPPERS:
            function = getattr(function, wrapped) if isinstance(function, kind) else function
        if not isinstance(function, FunctionType) or function in self.codes or not _is_of_model(function.__module__):
            return
        self.codes.add(function)
        code, known = function.__code__, function.__globals__
        for name in code.co_names:
            if name in known:
                value = known[name]
                if isinstance(value, (ModuleType, type)):
                    # `settings.rate`: the names in a function's code do not tell which belongs to which.
                    within = vars(value) if _is_of_model(getattr(value, "__module__", value.__name__)) else {}
                    for inner in set(code.co_names) & set(within):
                        if isinstance(within[inner], (*LASTING, FunctionType)):
                            self._note(within, inner, value)
                elif any(value is setting for setting in _ASKED):  # under a name of the module's own
                    with contextlib.suppress(TypeError):  # it asks for something in particular
                        self.settings[value, ()] = value()
                elif not isinstance(value, Tensor):
                    self._note(known, name, known)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # not set yet
                if not isinstance(cell.cell_contents, (Tensor, nn.Module)):
                    self._note(_Cell(cell), name, cell)

    def uses(self, function: type) -> None:
        """That a class of functions is called, by what its methods are and read."""
        for kind in function.__mro__:
            if _is_of_model(kind.__module__):
                for name, value in list(vars(kind).items()):
                    if isinstance(value, (*LASTING, staticmethod)):
                        self._note(vars(kind), name, kind)

    def _describe(self, value: Any) -> None:
        if value is not _ABSENT and not isinstance(value, (*LASTING, Tensor)) and id(value) not in self.described:
            described = describe(value)
            if described[0] != "is":
                self.described[id(value)] = described
                self.copies += copies_of(value)

    def kept(self, value: Any) -> Any:
        """A value as facts keep it."""
        return _Kept(value, id(value) not in self.tied) if isinstance(value, Tensor) else value

    def asks_for_shape(self) -> None:
        """That the shape or dtype of a tensor is asked for that no stand-in was handed out for."""
        self.asked_for_shapes |= self._listens

    def calls(self, module: nn.Module) -> bool:
        """That a module is called; whether it has hooks."""
        hooked = has_hooks(module)
        self.modules[id(module)] = module
        self.hooked.setdefault(id(module), (module, hooked))
        return hooked

    def computes_with(self, tensor: Tensor) -> None:
        """That the values of a tensor are taken as they are now."""
        self.versions.setdefault(id(tensor), (tensor, tensor._version))

    def is_at(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        """That a tensor which was come by elsewhere is the one that is found there."""
        self.tied.add(id(tensor))
        self.attributes[id(module), name] = module, name, tensor
        self.modules[id(module)] = module

    def set_by_forward(self) -> Iterator[tuple[nn.Module, str, fx.Proxy]]:
        """Tensors that the forward keeps for its next call: buffers, and attributes that it reads before it sets them."""
        for module in self.modules.values():
            for name, now in dict.items(module._buffers):
                if isinstance(now, fx.Proxy):
                    yield module, name, now
        for module, name, value in self.attributes.values():
            now = vars(module).get(name)
            if not isinstance(now, fx.Proxy) or now.node.op == "get_attr":
                continue
            # What is made of no input, such as a mask of some size, is made to save time, and is made anew at each call.
            if isinstance(value, Tensor) or _depends_on_inputs(now):
                yield module, name, now

    def refuse_changes(self, advice: str) -> None:
        """A forward that reads what is no tensor, and changes it, is another one at each call.

        Raises:
            CaptureError: it is such a one.
        """
        for module, name, value in self.attributes.values():
            now = _attribute(module, name)
            if isinstance(value, Tensor) or isinstance(now, fx.Proxy):
                continue
            if now is value:
                # Not what it keeps to save time: see above.
                proxies = [item for item in items_in(value) if isinstance(item, fx.Proxy)]
                evolves = id(value) in self.described and describe(value) != self.described[id(value)]
                evolves = evolves and (not proxies or any(map(_depends_on_inputs, proxies)))
            else:
                if value is _ABSENT:
                    value = inspect.getattr_static(type(module), name, _ABSENT)
                evolves = (value is _ABSENT or isinstance(value, LASTING)) and describe(now) != describe(value)
            if evolves:
                raise CaptureError(
                    f"the model keeps {type(module).__name__}.{name} from call to call: it reads it and changes it; {advice}"
                )


def _depends_on_inputs(value: fx.Proxy) -> bool:
    return any(node.op == "placeholder" for node in _sources(value.node))


class _Cell(Mapping[str, Any]):
    """What a closure holds under a name."""

    def __init__(self, cell: CellType) -> None:
        self.cell = cell

    def __getitem__(self, name: str) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 1


def _is_of_model(module: str | None) -> bool:
    """Whether code of a Python module is part of what was traced, and not of PyTorch or of Python itself."""
    package = (module or "torch").partition(".")[0]
    return (
        package not in ("torch", "numpy", "pcr_fx", *sys.builtin_module_names)
        and package not in sys.stdlib_module_names
    )


def _place(module: nn.Module, name: str, value: Any) -> str | None:
    """Where a module keeps what it has under a name: in which dict of its own, `__dict__` itself, or "" for anywhere."""
    if value is _ABSENT and not hasattr(type(module), name):
        return ""
    held = module.__dict__
    return next((place for place in _CONTENTS if name in (held.get(place) or ()) and name not in held), None)


def _find(held: dict[str, Any], place: str | None, name: str) -> Any:
    """What a module, which holds that in its `__dict__`, keeps at a place under a name."""
    if place is None:
        return held.get(name, _ABSENT)
    if place:
        kept = held[place]
        value = kept.get(name, _ABSENT)
        return getattr(kept, "parts", {}).get(name, _ABSENT) if value is _ABSENT else value
    places = (place for place in (None, *_CONTENTS) if place is None or held.get(place))
    return next((value for place in places if (value := _find(held, place, name)) is not _ABSENT), _ABSENT)


def _attribute(module: nn.Module, name: str) -> Any:
    """What a module keeps under a name."""
    return _find(object.__getattribute__(module, "__dict__"), "", name)


def _contents(module: nn.Module, name: str) -> Any:
    """The submodules of a module; of parameters and buffers their names: each may be exchanged for another."""
    kept = object.__getattribute__(module, "__dict__")[name]
    if name == "_modules":
        aside = getattr(kept, "aside", ())
        return [(key, value) for key, value in dict.items(kept) if key not in aside]
    return sorted(
        [(key, value is None) for key, value in dict.items(kept)] + [(key, False) for key in getattr(kept, "parts", ())]
    )


def _tied(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    again: set[int] = set()
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values()):
            if value is not None:
                (again if id(value) in seen else seen).add(id(value))
    return again


def _spec(tensor: Tensor | Part) -> Any:
    is_plain = type(tensor) in (Tensor, nn.Parameter, Part)
    return None if is_plain else type(tensor), tensor.shape, tensor.dtype, tensor.device


def _sources(node: fx.Node) -> set[fx.Node]:
    """All nodes that a node is computed from, and itself."""
    found, pending = {node}, [node]
    while pending:
        new = set(pending.pop().all_input_nodes) - found
        found |= new
        pending += new
    return found
