"""What a forward reads of its model while it is traced."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Set
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from pcr_fx.errors import CaptureError
from pcr_fx.graphs.hooks import has_hooks
from pcr_fx.passes.contents import LASTING, copies_of, describe, items_in, only_grew
from pcr_fx.passes.places import ABSENT, CONTENTS, attribute_of, contents_of
from pcr_fx.passes.stores import Stores, names_stored
from pcr_fx.watched import Part

# What is read by PyTorch itself.
_OWN = (frozenset(vars(nn.Module())) | frozenset(vars(nn.Module))) - {"training", "forward", *CONTENTS}
# Tensors that a trace finds in no module are kept by the root under such names.
CONSTANT = "_tensor_constant"
_SETTINGS = """are_deterministic_algorithms_enabled get_autocast_cpu_dtype get_autocast_dtype get_autocast_gpu_dtype
get_default_dtype get_default_device is_autocast_cache_enabled is_autocast_cpu_enabled is_autocast_enabled is_grad_enabled
is_inference_mode_enabled""".split()
_ASKED = [getattr(torch, name) for name in _SETTINGS if hasattr(torch, name)]
_ASKED_NAMES = frozenset(_SETTINGS)
AUTOCAST_DEVICES = "cpu", "cuda"
# What warns when it is called, and what answers the same.
_DEPRECATED: dict[Callable[..., Any], tuple[Callable[..., Any], tuple[str]]] = {
    torch.is_autocast_cpu_enabled: (torch.is_autocast_enabled, ("cpu",)),
    torch.get_autocast_cpu_dtype: (torch.get_autocast_dtype, ("cpu",)),
    torch.get_autocast_gpu_dtype: (torch.get_autocast_dtype, ("cuda",)),
}


def _answers() -> dict[tuple[Callable[..., Any], tuple[Any, ...]], Any]:
    """What the settings are now, by what is asked of PyTorch."""
    found: dict[tuple[Callable[..., Any], tuple[Any, ...]], Any] = {}
    for asked in _ASKED:
        if asked not in _DEPRECATED:
            for given in ((), *((device,) for device in AUTOCAST_DEVICES)):
                with contextlib.suppress(TypeError):  # it takes no such argument
                    found[asked, given] = asked(*given)
    return found | {(old, ()): found[new, given] for old, (new, given) in _DEPRECATED.items()}


_WRAPPERS = (
    (functools.partial, "func"),
    (MethodType, "__func__"),
    (property, "fget"),
    (classmethod, "__func__"),
    (staticmethod, "__func__"),
)


class Kept:
    """A fact about a tensor, which this does not keep alive.

    Args:
        alone: whether any other may take its place.
    """

    def __init__(self, tensor: Tensor, alone: bool) -> None:
        self.spec = _spec(tensor)
        self.itself = None if alone else weakref.ref(tensor)

    def holds(self, now: Any, with_shapes: bool, with_class: bool = True) -> bool:
        if not isinstance(now, (Tensor, Part)) or (self.itself is not None and self.itself() is not now):
            return False
        first = 0 if with_class else 1
        return not with_shapes or _spec(now)[first:] == self.spec[first:]


class Reading:
    """Records what is read of a model while it is traced.

    Attributes:
        before: what each module kept when that began.
        attributes: what was read of modules: the module, the name, and the value that stood there before.
        elsewhere: what was found in a class, in a module of Python or in a closure, or not found in a class: the dict, the
            name, the value.
        contents: submodules, or the names of parameters or buffers, of modules that were asked for all.
        modules: every module that anything was read of.
        hooked: the modules that were called, each with whether it has hooks.
        settings: what was asked of PyTorch, and the answer.
        asked_for_shapes: whether the forward asked for the shape of a tensor other than its stand-ins.
        versions: tensors whose values were computed with, each with its version.
        described: the values of `attributes` and `elsewhere` that may change, as they were, by their ids.
        codes: the functions that were looked into.
        stores: what the forward stores.
        copies: the containers in what was read, each with a copy.
        tied: the ids of parameters and buffers that are in several places, of which a graph reads one.
        made: modules that the forward makes anew, as `self.blocks[:3]` does; what is in them it has read elsewhere.
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
        self.made: dict[int, nn.Module] = {}
        self.copies: list[tuple[Any, Any]] = []
        self.codes: set[tuple[FunctionType, type | None]] = set()
        self.stores = Stores()
        self._usual = _answers()
        self._listens = False
        self.asked_for_shapes = False
        for module in model.modules():
            self._keep(module)

    def _keep(self, module: nn.Module) -> dict[str, Any]:
        held = module.__dict__
        kept = {name: value for values in CONTENTS[::-1] for name, value in (held.get(values) or {}).items()}
        self.before[id(module)] = kept | held
        return self.before[id(module)]

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """For the time of a trace, which must be the only one."""

        def get(module: nn.Module, name: str) -> Any:
            if self._listens and name not in _OWN and not name.startswith(("__", CONSTANT)):
                self._read(module, name)
            return object.__getattribute__(module, name)

        def make(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            if self._listens:
                self.made[id(module)] = module
            init(module, *args, **kwargs)

        init = nn.Module.__init__
        with contextlib.ExitStack() as stack:
            nn.Module.__init__ = make  # type: ignore[method-assign,assignment]
            stack.callback(setattr, nn.Module, "__init__", init)
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
            # Where the forward has switched the setting itself, the answer says nothing of whoever calls it.
            if self._listens and self._usual.get((function, given), value) == value:
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
        if id(module) in self.made:
            if attribute_of(module, name) is ABSENT:
                self.of_class(type(module), name)
            return
        self.modules[id(module)] = module
        if name in CONTENTS:
            if key not in self.contents:
                self.contents[key] = module, name, contents_of(module, name)
            return
        before = self.before.get(id(module)) or self._keep(module)
        value, now = before.get(name, ABSENT), attribute_of(module, name)
        is_stand_in = isinstance(now, fx.Proxy) and isinstance(value, Tensor)
        if now is value or is_stand_in:  # else it is the forward's own doing
            self.attributes[key] = module, name, value
            self._describe(value)
            self._read_code(value, type(module))
        if value is ABSENT:
            self.of_class(type(module), name)

    def of_class(self, kind: type, name: str, every: bool = False) -> None:
        """What a class has under a name, and that no class before it has; by `super()` it may be any (`every`)."""
        for owner in kind.__mro__:
            if owner in (nn.Module, object):
                return
            if name in owner.__dict__:
                self._note(owner.__dict__, name, owner, kind)
                if not every:
                    return
            else:
                self.elsewhere.setdefault((id(owner), name), (owner.__dict__, name, ABSENT))

    def uses(self, function: type) -> None:
        """That a class of functions is called, by what its methods are and read."""
        for kind in function.__mro__:
            if _is_of_model(kind.__module__):
                for name, value in list(vars(kind).items()):
                    if isinstance(value, (*LASTING, staticmethod)):
                        self._note(vars(kind), name, kind)

    def _note(self, holder: Mapping[str, Any], name: str, kept_by: Any, kind: type | None = None) -> None:
        """That a name stands for a value; of a function also for what it finds by the names in its code.

        Args:
            kind: the class that it was found by, if it is a method.
        """
        key, value = (id(kept_by), name), holder[name]
        if key not in self.elsewhere:
            self.elsewhere[key] = holder, name, value
            self._describe(value)
        self._read_code(value, kind)

    def _read_code(self, function: Any, kind: type | None = None) -> None:
        """Of a function of the model what it finds by the names in its code; of PyTorch's only which functions it calls."""
        for wrapper, wrapped in _WRAPPERS:
            function = getattr(function, wrapped) if isinstance(function, wrapper) else function
        if not isinstance(function, FunctionType):
            return
        calls_super = kind is not None and "__class__" in function.__code__.co_freevars
        key = function, kind if calls_super else None
        is_of_model = _is_of_model(function.__module__)
        if key in self.codes or not (is_of_model or str(function.__module__).startswith("torch.nn.modules.")):
            return
        self.codes.add(key)
        self._read_functions(function)
        if is_of_model:
            self._read_globals(function)
            self._read_closure(function)
        if calls_super:
            for name in function.__code__.co_names:
                if any(name in owner.__dict__ for owner in kind.__mro__):  # type: ignore[union-attr]
                    self.of_class(kind, name, every=True)  # type: ignore[arg-type]

    def _read_functions(self, function: FunctionType) -> None:
        """PyTorch's functions, which may be exchanged for others: `F.linear = ...`."""
        names = set(function.__code__.co_names)
        for name in names:
            value = function.__globals__.get(name)
            if value is torch or value is torch.nn.functional:
                for inner in names - _ASKED_NAMES:
                    if isinstance(vars(value).get(inner), FunctionType | BuiltinFunctionType):
                        self._note(vars(value), inner, value)

    def _read_globals(self, function: FunctionType) -> None:
        names, known = function.__code__.co_names, function.__globals__
        stored, read, _ = names_stored(function)
        for name in stored:
            self.stores.watch(known, known, name)
        for name in names:
            if name not in known or name in stored - read:
                continue
            value = known[name]
            if isinstance(value, (ModuleType, type)):
                # `settings.rate`: the names in a function's code do not tell which belongs to which.
                within = vars(value) if _is_of_model(getattr(value, "__module__", value.__name__)) else {}
                for inner in set(names) & set(within):
                    if isinstance(within[inner], (*LASTING, FunctionType, staticmethod, classmethod)):
                        self._note(within, inner, value)
            elif any(value is setting for setting in _ASKED):  # under a name of the module's own
                if (value, ()) in self._usual:  # else it asks for something in particular
                    self.settings[value, ()] = self._usual[value, ()]
            elif not isinstance(value, Tensor):
                self._note(known, name, known)

    def _read_closure(self, function: FunctionType) -> None:
        _, _, stored = names_stored(function)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name in stored:
                self.stores.watch(_Cell(cell), cell, name)
            with contextlib.suppress(ValueError):  # not set yet
                if not isinstance(cell.cell_contents, (Tensor, nn.Module)):
                    self._note(_Cell(cell), name, cell)

    def _describe(self, value: Any) -> None:
        if value is not ABSENT and not isinstance(value, (*LASTING, Tensor)) and id(value) not in self.described:
            described = describe(value)
            if described[0] != "is":
                self.described[id(value)] = described
                self.copies += copies_of(value)

    def kept(self, value: Any) -> Any:
        """A value as facts keep it."""
        return Kept(value, id(value) not in self.tied) if isinstance(value, Tensor) else value

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

    def reads(self, key: tuple[int, str]) -> bool:
        """Whether the forward reads what somebody, by id, keeps under a name."""
        return key in self.attributes or key in self.elsewhere

    def refuse_changes(self, stored: Set[tuple[int, str]], advice: str) -> list[str]:
        """A forward that reads what is no tensor, and changes it, is another one at each call.

        Args:
            stored: what is stored at each call, by who keeps it and name.

        Returns:
            The names of what is no module's and only grows, as what is kept to save time does.

        Raises:
            CaptureError: it is such a one.
        """
        for module, name, value in self.attributes.values():
            now = attribute_of(module, name)
            if isinstance(value, Tensor) or isinstance(now, fx.Proxy) or (id(module), name) in stored:
                continue
            if now is value:
                # Not what it keeps to save time: see above.
                proxies = [item for item in items_in(value) if isinstance(item, fx.Proxy)]
                evolves = id(value) in self.described and describe(value) != self.described[id(value)]
                evolves = evolves and (not proxies or any(map(depends_on_inputs, proxies)))
            else:
                if value is ABSENT:
                    value = inspect.getattr_static(type(module), name, ABSENT)
                evolves = (value is ABSENT or isinstance(value, LASTING)) and describe(now) != describe(value)
            if evolves:
                raise CaptureError(_keeps(f"{type(module).__name__}.{name}", advice))
        grown = []
        for holder, name, value in self.elsewhere.values():
            if (
                holder.get(name) is value
                and id(value) in self.described
                and describe(value) != self.described[id(value)]
            ):
                inner = {id(container) for container, _ in copies_of(value)}
                if not all(only_grew(*pair, _evolves) for pair in self.copies if id(pair[0]) in inner):
                    raise CaptureError(_keeps(name, advice))
                grown.append(name)
        return grown


def _evolves(value: Any) -> bool:
    """Whether a tensor in a value is another one at each call."""
    return any(isinstance(item, fx.Proxy) and depends_on_inputs(item) for item in items_in([value]))


def _keeps(name: str, advice: str) -> str:
    return f"the model keeps {name} from call to call: it reads it and changes it; {advice}"


def depends_on_inputs(value: fx.Proxy) -> bool:
    return any(node.op == "placeholder" for node in _sources(value.node))


class _Cell(MutableMapping[str, Any]):
    """What a closure holds under a name."""

    def __init__(self, cell: CellType) -> None:
        self.cell = cell

    def __getitem__(self, name: str) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        self.cell.cell_contents = value

    def __delitem__(self, name: str) -> None:
        del self.cell.cell_contents

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
    return None if is_plain else type(tensor), *form_of(tensor)


def form_of(tensor: Tensor | Part) -> tuple[Any, ...]:
    """All that can be asked of a tensor's memory: shape, dtype, device and strides, or what it has in place of these."""
    if isinstance(tensor, Part):
        return tensor.shape, tensor.dtype, tensor.device, tensor.holder[tensor.name].stride()[1:]
    strides = tensor.stride() if tensor.layout is torch.strided else tensor.layout
    return tensor.shape, tensor.dtype, tensor.device, strides


def _sources(node: fx.Node) -> set[fx.Node]:
    """All nodes that a node is computed from, and itself."""
    found, pending = {node}, [node]
    while pending:
        new = set(pending.pop().all_input_nodes) - found
        found |= new
        pending += new
    return found
