"""What a forward computes of constants alone while it is traced: it may branch on that, or read its numbers.

A grid of times that is checked to increase, a table of steps that a scheduler reads. Buffers are such constants too, as long as
nobody writes to them; parameters are not, since each step of training does.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils import _pytree as pytree

from pcr_fx.graphs.effects import hides_ops, is_barrier, is_random, writes
from pcr_fx.graphs.nodes import is_pytorchs, op_name
from pcr_fx.passes.shapes import FakeValues

# Methods that hand out numbers.
TELLING = frozenset("item tolist numpy".split())
# Ops that fill a new tensor with a number, and take shape, dtype and device of another.
_FILLING = frozenset("zeros_like ones_like full_like new_zeros new_ones new_full".split())
# Numbers in a tensor that is looked into: a grid or a mask has no more.
_MOST_NUMBERS = 2**16


class NotKnown(Exception):
    """A value depends on more than constants."""


class KnownValues:
    """Follows a trace, and evaluates those of its ops that depend on constants alone, in their order: some write.

    Args:
        tracer: whose graph it is.
    """

    def __init__(self, tracer: Any) -> None:
        self.tracer = tracer
        self._values: dict[fx.Node, Any] = {}
        # The nodes that a value hangs on: attributes by what they hold, and others by their shape.
        self._origins: dict[fx.Node, frozenset[fx.Node]] = {}
        self._last: fx.Node | None = None

    def of(self, node: fx.Node) -> Any:
        """The value of a node; what it hangs on of the model may not change from now on.

        Raises:
            NotKnown: it depends on an argument of the forward, a parameter or a random number.
        """
        with torch._C.DisableTorchFunction(), torch.no_grad():
            self._follow(node.graph)
            if node not in self._values:
                raise NotKnown
            for origin in self._origins[node]:
                self._note(origin)
            return self._values[node]

    def form_of(self, node: fx.Node, values: FakeValues) -> Any:
        """What a node would be; where that hangs on numbers, such as how many are not zero, they must be those of constants.

        Raises:
            DataDependentOutputException, DynamicOutputShapeException: they are others'.
        """
        try:
            return values.evaluate(node)
        except (DataDependentOutputException, DynamicOutputShapeException):
            with contextlib.suppress(NotKnown):
                return values.fakes_of(self.of(node))
            raise

    def origins(self, node: fx.Node) -> frozenset[fx.Node] | None:
        """What the value of a node hangs on, of which it is not taken note; `None` where it is not known."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            self._follow(node.graph)
        return self._origins[node] if node in self._values else None

    def place(self, index: Any) -> Any:
        """An index with numbers in place of tensors that hold a whole one: nobody else could tell where that is."""
        if isinstance(index, tuple):
            return tuple(map(self.place, index))
        value = index.node.meta.get("example_value") if issubclass(type(index), fx.Proxy) else None
        is_number = type(value) is not Tensor and isinstance(value, Tensor) and not value.dim()
        if is_number and value.dtype is not torch.bool and not value.dtype.is_floating_point:
            with contextlib.suppress(NotKnown):
                return int(self.of(index.node))
        return index

    def _follow(self, graph: fx.Graph) -> None:
        """Evaluate what is new."""
        node = graph._root if self._last is None else self._last
        while node.next is not graph._root:
            node = self._last = node.next
            if node.op == "get_attr":
                self._take_attribute(node)
            elif node.op in ("call_function", "call_method") and not self._take(node):
                for written in writes(node):
                    self._forget(written)

    def _take_attribute(self, node: fx.Node) -> None:
        value = self.tracer._attribute(str(node.target))
        is_own = issubclass(type(value), fx.Proxy)  # the forward has stored it
        if not is_own and isinstance(value, Tensor) and not value.requires_grad and _is_small(value):
            self._values[node], self._origins[node] = value.clone(), frozenset([node])

    def _take(self, node: fx.Node) -> bool:
        """Evaluate an op, if that is possible."""
        if is_random(node) or is_barrier(node) or hides_ops(node):
            return False
        if node.op == "call_function" and not is_pytorchs(node.target):
            return False
        like = node.args[0] if _takes_shape(node) else None
        sources = [one for one in node.all_input_nodes if one is not like]
        if not self._values.keys() >= set(sources):
            return False
        if any(one.op == "get_attr" for written in writes(node) for one in self._origins[written]):
            return False  # which another call finds changed
        try:
            given = {like: self._empty(like)} if isinstance(like, fx.Node) else {}
            args, kwargs = fx.node.map_arg(
                (node.args, node.kwargs), lambda one: given[one] if one in given else self._values[one]
            )
            if node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                value = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # whoever calls it for real is told
            return False
        if not all(_is_small(one) for one in pytree.tree_leaves(value) if isinstance(one, Tensor)):
            return False
        self._values[node] = value
        self._origins[node] = frozenset(given).union(*(self._origins[one] for one in sources))
        return True

    def _empty(self, node: fx.Node) -> Tensor:
        value: Any = node.meta["example_value"]
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)

    def _forget(self, node: fx.Node) -> None:
        """What lies in the memory of a node is not known any more."""
        value = self._values.get(node)
        if isinstance(value, Tensor):
            memory = value.untyped_storage().data_ptr()
            for known, other in list(self._values.items()):
                if isinstance(other, Tensor) and other.untyped_storage().data_ptr() == memory:
                    del self._values[known]

    def _note(self, origin: fx.Node) -> None:
        """Have the graph hold for as long as this is what it is."""
        if origin.op == "get_attr":
            self.tracer.takes_value_of(str(origin.target))
        else:
            self.tracer.questions.sizes(origin, origin.meta["example_value"].shape).whole()


def _is_small(value: Tensor) -> bool:
    """Whether a tensor may be looked into: one that requires gradients changes in training."""
    is_plain = value.layout is torch.strided and not value.is_meta and not value.requires_grad
    return is_plain and value.numel() <= _MOST_NUMBERS


def _takes_shape(node: fx.Node) -> bool:
    """Whether an op takes no more from its first argument than shape, dtype and device."""
    return op_name(node) in _FILLING and bool(node.args) and isinstance(node.args[0], fx.Node)
