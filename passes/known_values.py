"""What a forward computes of constants alone while it is traced: it may branch on that, or read its numbers.

A grid of times that is checked to increase, a table of steps that a scheduler reads. Buffers are such constants too, as long as
nobody writes to them; parameters are not, since each step of training does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from pcr_fx.graphs.effects import hides_ops, is_barrier, is_random, writes

# Methods that hand out numbers.
TELLING = frozenset("item tolist numpy".split())


class NotKnown(Exception):
    """A value depends on more than constants."""


class KnownValues:
    """Evaluates nodes of a graph that grows.

    Args:
        attribute: the tensor that a `get_attr` node reads, taken note of as one whose values matter; it raises `NotKnown`.
    """

    def __init__(self, attribute: Callable[[fx.Node], Tensor]) -> None:
        self.attribute = attribute
        self._values: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> Any:
        """The value of a node.

        Raises:
            NotKnown: it depends on an argument of the forward, a parameter or a random number, or is written to.
        """
        pending = [node]
        while pending:
            present = pending[-1]
            missing = [source for source in present.all_input_nodes if source not in self._values]
            if present in self._values or not missing:
                self._values.setdefault(present, self._evaluate(present) if present not in self._values else None)
                pending.pop()
            else:
                if present.op == "placeholder":
                    raise NotKnown
                pending += missing
        if any(map(_is_written, self._ancestors(node))):
            raise NotKnown
        return self._values[node]

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self.attribute(node)
        if node.op not in ("call_function", "call_method"):
            raise NotKnown
        if is_random(node) or is_barrier(node) or hides_ops(node) or writes(node):
            raise NotKnown
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._values.__getitem__)
        with torch.no_grad():
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _ancestors(self, node: fx.Node) -> set[fx.Node]:
        found, pending = {node}, [node]
        while pending:
            new = set(pending.pop().all_input_nodes) - found
            found |= new
            pending += new
        return found


def _is_written(node: fx.Node) -> bool:
    """Whether an op writes to a node."""
    return any(node in writes(user) for user in node.users)
