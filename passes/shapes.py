"""What ops return for inputs of certain shapes, what a forward asked of that, and for which others it would be told the same."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from pcr_fx.body.isolation import tracing
from pcr_fx.graphs.effects import RESHAPING_METHODS
from pcr_fx.graphs.hooks import HookOp
from pcr_fx.passes.open_sizes import OpenSize

# What only a real tensor would know.
UNKNOWN = frozenset("requires_grad is_leaf grad grad_fn _version".split())
# What gives results of one shape whatever numbers a tensor meets.
_ARITHMETIC = frozenset((operator.add, operator.sub, operator.mul, operator.truediv, operator.pow))
# Sizes of inputs of which a graph remembers whether it holds for them.
_VERDICTS = 256


class FakeValues:
    """What the nodes of a graph would be for some arguments: shape, dtype and device are all that is asked of it.

    Args:
        arguments: of the forward, by name.
        attribute: the attribute of the model that has a path.
        mode: that of other fake tensors that these are going to meet.
    """

    def __init__(
        self, arguments: Mapping[str, Any], attribute: Callable[[str], Any], mode: FakeTensorMode | None = None
    ) -> None:
        self.arguments, self.attribute = arguments, attribute
        self.mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
        # By shape, strides, dtype and device: blocks that repeat ask the same question again and again.
        self.fakes: dict[Any, Tensor] = {}
        self.values: dict[Any, Any] = {}

    def evaluate(self, node: fx.Node) -> Any:
        """The value of a node whose arguments have theirs."""
        if node.op == "placeholder":
            return self.fakes_of(self.arguments[str(node.target)])
        if node.op == "get_attr":
            return self.fakes_of(self.attribute(str(node.target)))
        return self._result(node)

    def of(self, node: fx.Node) -> Any:
        """The value of a node, found now if it has none."""
        if "example_value" not in node.meta:
            # A constant, for which the base class makes a node of its own.
            node.meta["example_value"] = self.evaluate(node)
        return node.meta["example_value"]

    def _result(self, node: fx.Node) -> Any:
        if node.target is getattr and node.args[1] in UNKNOWN:
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.of)
        if isinstance(node.target, HookOp):
            return node.target.assumed(args)
        try:
            key = (node.op, node.target, _form_of(node.target, args), _frozen(kwargs))
            if key in self.values:
                return self.values[key]
        except TypeError:
            key = None
        reshapes = node.op == "call_method" and node.target in RESHAPING_METHODS
        with self.mode, torch._C.DisableTorchFunction(), torch.no_grad():
            if reshapes:
                args = (args[0].detach(), *args[1:])
            if node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                value = node.target(*args, **kwargs)  # type: ignore[operator]
        value = self.fakes_of(value)
        if reshapes:
            node.args[0].meta["example_value"] = value  # type: ignore[union-attr]
        elif key is not None:
            self.values[key] = value
        return value

    def fakes_of(self, value: Any) -> Any:
        """A value with fake tensors in place of tensors."""
        return pytree.tree_map_only(Tensor, self._fake, value)

    def _fake(self, value: Tensor) -> Tensor:
        """The one fake tensor of the shape, strides, dtype and device of `value`."""
        if value.layout is not torch.strided:
            return value
        key = (value.shape, value.stride(), value.dtype, value.device)
        if key not in self.fakes:
            with self.mode, torch._C.DisableTorchFunction():
                self.fakes[key] = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device=value.device
                )
        return self.fakes[key]


class Sizes(tuple[int, ...]):
    """A tensor's shape, which tells a listener which of its sizes are asked for. Otherwise as `torch.Size`."""

    listener: Callable[[int], None]
    node: fx.Node

    @classmethod
    def of(cls, shape: torch.Size, node: fx.Node, listener: Callable[[int], None]) -> Sizes:
        made = cls(shape)
        made.listener, made.node = listener, node
        return made

    def open(self, index: int) -> OpenSize:
        """The size of a dimension, not asked for yet."""
        return OpenSize(tuple.__getitem__(self, index), lambda: self.listener(index), (self.node, index))

    def whole(self) -> torch.Size:
        """All of them, asked for."""
        for index in range(len(self)):
            self.listener(index)
        return torch.Size(tuple.__iter__(self))

    def __getitem__(self, index: Any) -> Any:
        chosen = range(len(self))[index]
        if isinstance(chosen, int):
            return self.open(chosen)
        for each in chosen:
            self.listener(each)
        return torch.Size(tuple.__getitem__(self, index))

    def __iter__(self) -> Iterator[Any]:
        return map(self.open, range(len(self)))

    def __fx_create_arg__(self, tracer: fx.Tracer) -> torch.Size:
        return self.whole()

    def __reduce__(self) -> Any:
        return torch.Size, (tuple(self.whole()),)


def whole_shapes(value: Any) -> Any:
    """A value with `torch.Size` in place of each shape, all of it asked for."""
    return pytree.tree_map_only(Sizes, Sizes.whole, value, is_leaf=lambda leaf: type(leaf) is Sizes)


def _ask_for_all(name: str) -> None:
    def method(self: Sizes, *others: Any) -> Any:
        return getattr(self.whole(), name)(*(other.whole() if type(other) is Sizes else other for other in others))

    method.__name__ = name
    setattr(Sizes, name, method)


for _name in (
    "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __hash__ __repr__ __str__ __contains__ __add__ __mul__ __rmul__ index count numel"
).split():
    _ask_for_all(_name)
# `(1,) + shape`.
Sizes.__radd__ = lambda self, other: torch.Size((*other, *self.whole()))  # type: ignore[attr-defined]


@dataclass(eq=False)
class Questions:
    """What a forward asked of shapes while it was traced.

    Attributes:
        asked: each question as an op on nodes of the traced graph, and the answer.
        every_size: whether it may hang on the size of any input for all that is known.
    """

    asked: dict[Any, tuple[str, Any, tuple[Any, ...], dict[str, Any], Any]] = field(default_factory=dict)
    every_size: bool = False

    def ask(self, op: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], answer: Any) -> Any:
        """Take note of a question, once, and hand on its answer."""
        key = (op, target, repr(args), repr(kwargs))  # nodes have names
        self.asked.setdefault(key, (op, target, args, dict(kwargs), answer))
        return answer

    def sizes(self, node: fx.Node, shape: torch.Size) -> Sizes:
        """The shape of a node, of which each size is a question of its own."""

        def listen(dim: int) -> None:
            self.ask("call_method", "size", (node, dim), {}, tuple.__getitem__(shape, dim))

        return Sizes.of(shape, node, listen)

    def length(self, node: fx.Node, value: Any) -> int:
        return self.ask("call_function", len, (node,), {}, len(value))

    def kept(self, graph: fx.Graph, values: FakeValues | None) -> Answers | None:
        """What it takes to ask again; `None` where nothing was asked. Passes change `graph` later on.

        Args:
            values: those of the graph's nodes; `None` where no shapes were known.
        """
        if not self.asked and not self.every_size:
            return None
        if values is None:
            return Answers(fx.Graph(), [], None, True, ())
        needed = {node for _, _, args, kwargs, _ in self.asked.values() for node in _nodes((args, kwargs))}
        reshapes = any(node.op == "call_method" and node.target in RESHAPING_METHODS for node in graph.nodes)
        for node in reversed(graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        kept, copies, answers = fx.Graph(), dict[fx.Node, fx.Node](), list[tuple[fx.Node, Any]]()
        waiting = list(self.asked.values())
        for node in graph.nodes:
            if node not in needed:
                continue
            copy = copies[node] = kept.node_copy(node, copies.__getitem__)
            copy.meta = {"example_value": values.of(node)} if node.op == "get_attr" else {}
            # Asked as soon as it can be: ops that refuse other sizes come after the question that tells them apart.
            while waiting and all(each in copies for each in _nodes(waiting[0][2:4])):
                op, target, args, kwargs, answer = waiting.pop(0)
                args, kwargs = fx.node.map_arg((args, kwargs), copies.__getitem__)
                answers.append((kept.create_node(op, target, args, kwargs), answer))
        assert not waiting, "questions are asked in the order of the graph"
        return Answers(kept, answers, values.mode, self.every_size or reshapes, sizes_of(values.arguments))


@dataclass(eq=False)
class Answers:
    """Tells for which other sizes a graph would have been traced as it was: its questions have the same answers.

    Attributes:
        graph: the questions, and what they are about.
        answers: to each question.
        every_size: whether it is right for no other.
        sizes: those that it was traced with.
    """

    graph: fx.Graph
    answers: list[tuple[fx.Node, Any]]
    mode: FakeTensorMode | None
    every_size: bool
    sizes: tuple[torch.Size, ...]
    _verdicts: OrderedDict[tuple[torch.Size, ...], bool] = field(default_factory=OrderedDict)

    def hold_for(self, arguments: Mapping[str, Any]) -> bool:
        """Whether they do for these arguments, which differ from those traced with in nothing but sizes."""
        sizes = sizes_of(arguments)
        if sizes == self.sizes:
            return True
        if self.every_size:
            return False
        verdict = self._verdicts.get(sizes)
        if verdict is None:
            with tracing():
                verdict = self._verdicts[sizes] = self._ask_again(arguments)
                if len(self._verdicts) > _VERDICTS:
                    self._verdicts.popitem(last=False)
        return verdict

    def _ask_again(self, arguments: Mapping[str, Any]) -> bool:
        values, told = FakeValues(arguments, _no_attribute, self.mode), dict(self.answers)
        known = [node for node in self.graph.nodes if node.op == "get_attr"]
        try:
            for node in self.graph.nodes:
                if node.op != "get_attr":
                    found = node.meta["example_value"] = values.evaluate(node)
                    if node in told and found != told[node]:
                        return False
            return True
        except Exception:  # ops refuse these sizes: whoever traces anew is told how
            return False
        finally:
            for node in set(self.graph.nodes) - set(known):
                node.meta.clear()


def sizes_of(value: Any) -> tuple[torch.Size, ...]:
    """The shapes of all tensors in a value, in order."""
    if isinstance(value, Tensor):
        return (value.shape,)
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return ()
    return tuple(shape for item in value for shape in sizes_of(item))


def _no_attribute(path: str) -> Any:
    raise KeyError(path)


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return found


def _form_of(target: Any, args: tuple[Any, ...]) -> Any:
    """A hashable stand-in for the arguments of an op, equal for those that give results of equal shape.

    Steps of a loop take one entry after another, and multiply by one number after another: which does not matter.
    """
    if target in _ARITHMETIC and any(isinstance(value, Tensor) for value in args):
        return tuple([type(value) if type(value) in (int, float) else _frozen(value) for value in args])
    if target is operator.getitem and isinstance(args[0], Tensor):
        form = _form_of_index(args[1] if isinstance(args[1], tuple) else (args[1],), args[0].shape)
        if form is not None:
            return id(args[0]), form
    return _frozen(args)


def _form_of_index(entries: tuple[Any, ...], shape: torch.Size) -> tuple[Any, ...] | None:
    """How many entries each part of an index takes; `None` where it takes other than one or a range, or what is not there."""
    if not all(type(entry) in (int, slice, type(None), type(Ellipsis)) for entry in entries):
        return None
    taken = sum(type(entry) in (int, slice) for entry in entries)
    if taken > len(shape) or entries.count(Ellipsis) > 1:
        return None
    form, dim = list[Any](), 0
    for entry in entries:
        if entry is Ellipsis:
            dim += len(shape) - taken
        if type(entry) not in (int, slice):
            form.append(entry)
            continue
        size = shape[dim]
        dim += 1
        if type(size) is not int:
            return None
        if type(entry) is int:
            if not -size <= entry < size:
                return None
            form.append(int)
            continue
        bounds = entry.start, entry.stop, entry.step
        if any(type(bound) not in (int, type(None)) for bound in bounds) or entry.step == 0 or (entry.step or 1) < 0:
            return None
        form.append((len(range(*entry.indices(size))), entry.step))
    return tuple(form)


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
