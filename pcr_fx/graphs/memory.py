"""Where the tensors lie that a graph is given: one of them may be a view of another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

_STORAGE = "storage"


def note_memory(values: Mapping[fx.Node, Any]) -> None:
    """Have nodes know in which storage their tensors lie.

    Args:
        values: the tensors of inputs and attributes, as far as they are known.
    """
    for node, value in values.items():
        storage = _storage_of(value)
        if storage is not None:
            node.meta[_STORAGE] = storage


def same_memory(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each input and attribute those in the same storage, itself among them.

    Whether they overlap there makes no difference: a write to one counts as one to all, for autograd too.
    """
    groups: dict[Any, list[fx.Node]] = {}
    same: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "placeholder"):
            same[node] = groups.setdefault(node.meta.get(_STORAGE, (node.op, node.target)), [])
            same[node].append(node)
    return same


def _storage_of(value: Any) -> int | None:
    if not isinstance(value, Tensor) or value.numel() == 0:
        return None
    try:
        return value.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # it has none, or several
        return None
