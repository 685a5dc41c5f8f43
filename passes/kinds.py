"""The kind of an op: all that it is apart from its wiring; and in words how two ops differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from pcr_fx.graphs.nodes import op_name
from pcr_fx.graphs.parts import OwnDerivative, OwnFunction, say_call

Value = Callable[[fx.Node], Any]


def flatten_arguments(node: fx.Node) -> list[Any]:
    """All leaves of an op's arguments, in a fixed order."""
    leaves: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda leaf: leaves.append(leaf))
    return leaves


def spec_of(value: Any) -> Any:
    """Shape, dtype and device of a tensor, the type of anything else, `None` when nothing is known."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return tuple(map(_size, value.shape)), value.dtype, value.device
    # No two graph modules have the same class.
    return fx.GraphModule if isinstance(value, fx.GraphModule) else type(value)


def _size(size: Any) -> int | str:
    """A size that the compiler leaves open by its symbol; one that it has fixed since is a number like any other."""
    if type(size) is int:
        return size
    known = size.node.maybe_as_int()
    return str(size) if known is None else known


def say_spec(spec: Any) -> str:
    """What `spec_of` returned, in words."""
    if isinstance(spec, tuple):
        return f"shape {list(spec[0])} and {spec[1]}".replace("'", "")
    return "unknown" if spec is None else getattr(spec, "__name__", str(spec))


class Kinds:
    """The kinds of a graph's ops: equal for ops that may stand at one place of two blocks.

    Args:
        value: the value of a node, as far as it is known: a tensor with shape, dtype and device.
    """

    def __init__(self, value: Value) -> None:
        self.value = value
        # Nodes share values; all are kept alive by the graph.
        self._specs: dict[int, Any] = {}

    def spec(self, node: fx.Node) -> Any:
        value = self.value(node)
        key = id(value)
        if key not in self._specs:
            self._specs[key] = spec_of(value)
        return self._specs[key]

    def of(self, node: fx.Node) -> tuple[Any, ...]:
        """Op, kinds of arguments, and shape, dtype and device of the result."""
        return node.op, node.target, self._kind(node.args), self._kind(node.kwargs), self.spec(node)

    def _kind(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self.spec(argument) or "op"
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
        """What sets `odd` apart from `usual`, in words; empty for two of one kind."""
        name = op_name(odd)
        if target_of(odd) != target_of(usual):
            return f"{name} stands where the other blocks have {op_name(usual)}"
        if self.of(odd) == self.of(usual):
            return ""
        if odd.target is not usual.target and (words := say_call(usual.target, odd.target)):
            return words
        expected, got = flatten_arguments(usual), flatten_arguments(odd)
        if len(expected) == len(got):
            for a, b in zip(expected, got, strict=True):
                if self._kind(a) != self._kind(b):
                    return f"{name} takes {self._say(b, a)} where the other blocks take {self._say(a, b)}"
        if self.spec(odd) != self.spec(usual):
            ours, theirs = self._say_specs(odd, usual)
            return f"{name} returns {ours} where the other blocks return {theirs}"
        return f"{name} is called with other arguments than in the other blocks"

    def _say(self, leaf: Any, other: Any) -> str:
        if not isinstance(leaf, fx.Node):
            return repr(leaf)
        if not isinstance(other, fx.Node):
            return leaf.name
        name = str(leaf.target) if leaf.op == "get_attr" else leaf.name
        return f"{name} of {self._say_specs(leaf, other)[0]}"

    def _say_specs(self, node: fx.Node, other: fx.Node) -> tuple[str, str]:
        """Both shapes, or what else of the values differs."""
        ours, theirs = self.spec(node), self.spec(other)
        if not (isinstance(ours, tuple) and isinstance(theirs, tuple)) or ours[0] != theirs[0]:
            return say_spec(ours), say_spec(theirs)
        part = 1 if ours[1] != theirs[1] else 2
        return str(ours[part]), str(theirs[part])


def target_of(node: fx.Node) -> tuple[str, Any]:
    """The op itself, whatever it is given, and a function with a derivative of its own whatever it is called with."""
    if isinstance(node.target, OwnFunction):
        return node.op, node.target.function
    return node.op, OwnDerivative if isinstance(node.target, OwnDerivative) else node.target
