"""What an op looks like apart from its wiring, and in words how two ops differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from pcr_fx.graphs.nodes import op_name

Value = Callable[[fx.Node], Any]


def flatten_arguments(node: fx.Node) -> list[Any]:
    """All leaves of an op's arguments, in a fixed order."""
    leaves: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda leaf: leaves.append(leaf))
    return leaves


def shape_of(value: Any) -> Any:
    """Shape, dtype and device of a tensor, the type of anything else, `None` when nothing is known."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return tuple(map(_size, value.shape)), value.dtype, value.device
    # Each graph module has a class of its own.
    return fx.GraphModule if isinstance(value, fx.GraphModule) else type(value)


def _size(size: Any) -> int | str:
    """A size that the compiler leaves open by its symbol; one that it has fixed since is a number like any other."""
    if type(size) is int:
        return size
    known = size.node.maybe_as_int()
    return str(size) if known is None else known


def say_shape(shape: Any) -> str:
    """What `shape_of` returned, in words."""
    if isinstance(shape, tuple):
        return f"shape {list(shape[0])} and {shape[1]}".replace("'", "")
    return "unknown" if shape is None else getattr(shape, "__name__", str(shape))


class Looks:
    """The looks of a graph's ops: equal for ops that may stand at one place of two blocks.

    Args:
        value: the value of a node, as far as it is known: a tensor with shape, dtype and device.
    """

    def __init__(self, value: Value) -> None:
        self.value = value
        # Values are shared by nodes that look alike; all are kept alive by the graph.
        self._shapes: dict[int, Any] = {}

    def shape(self, node: fx.Node) -> Any:
        value = self.value(node)
        key = id(value)
        if key not in self._shapes:
            self._shapes[key] = shape_of(value)
        return self._shapes[key]

    def of(self, node: fx.Node) -> tuple[Any, ...]:
        """Op, kinds of arguments and shape of the result."""
        return node.op, node.target, self._kind(node.args), self._kind(node.kwargs), self.shape(node)

    def _kind(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self.shape(argument) or "op"
        # How the leaves are nested matters: x[0, 1] is not x[[0, 1]].
        if isinstance(argument, (tuple, list)):
            return isinstance(argument, tuple), *map(self._kind, argument)
        if isinstance(argument, dict):
            return tuple([(name, self._kind(value)) for name, value in argument.items()])
        if isinstance(argument, slice):
            return slice, *map(self._kind, (argument.start, argument.stop, argument.step))
        # 1 and 0.5 may both be factors of one chain.
        return float if type(argument) is int else type(argument)

    def difference(self, usual: fx.Node, odd: fx.Node) -> str:
        """What sets `odd` apart from `usual`, in words; empty for two ops that look alike."""
        name = op_name(odd)
        if kind_of_op(odd) != kind_of_op(usual):
            return f"{name} stands where the other blocks have {op_name(usual)}"
        if self.of(odd) == self.of(usual):
            return ""
        expected, got = flatten_arguments(usual), flatten_arguments(odd)
        if len(expected) == len(got):
            for a, b in zip(expected, got, strict=True):
                if self._kind(a) != self._kind(b):
                    return f"{name} takes {self._say(b, a)} where the other blocks take {self._say(a, b)}"
        if self.shape(odd) != self.shape(usual):
            ours, theirs = self._say_shapes(odd, usual)
            return f"{name} returns {ours} where the other blocks return {theirs}"
        return f"{name} is called with other arguments than in the other blocks"

    def _say(self, leaf: Any, other: Any) -> str:
        if not isinstance(leaf, fx.Node):
            return repr(leaf)
        if not isinstance(other, fx.Node):
            return leaf.name
        name = str(leaf.target) if leaf.op == "get_attr" else leaf.name
        return f"{name} of {self._say_shapes(leaf, other)[0]}"

    def _say_shapes(self, node: fx.Node, other: fx.Node) -> tuple[str, str]:
        """Both shapes, or what else of the values differs."""
        ours, theirs = self.shape(node), self.shape(other)
        if not (isinstance(ours, tuple) and isinstance(theirs, tuple)) or ours[0] != theirs[0]:
            return say_shape(ours), say_shape(theirs)
        part = 1 if ours[1] != theirs[1] else 2
        return str(ours[part]), str(theirs[part])


def kind_of_op(node: fx.Node) -> tuple[str, Any]:
    """The op itself, whatever it is given."""
    return node.op, node.target
