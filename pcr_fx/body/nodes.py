"""What the nodes of an aten graph say of themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Of the tensor that `node` makes; () for a number."""
    return tuple(int(size) for size in getattr(node.meta.get("val"), "shape", ()))


def op_name(node: fx.Node) -> str:
    """As in messages, without the overload: aten.mm."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.replace("::", ".")
    return getattr(node.target, "__name__", str(node.target))


def aten_name(node: fx.Node) -> str | None:
    is_aten = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten"
    return op_name(node).removeprefix("aten.") if is_aten else None


def is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of an op by their names in its schema."""
    declared = node.target._schema.arguments  # type: ignore[union-attr]
    given = {argument.name: value for argument, value in zip(declared, node.args, strict=False)}
    return {argument.name: argument.default_value for argument in declared} | given | dict(node.kwargs)


def nodes_in(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from nodes_in(item)
