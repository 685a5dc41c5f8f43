"""What a node says of itself: its op by name, its arguments, its value's shape.

Two dialects meet here. A *captured* graph holds what a model's author wrote: functions, methods, Python's operators. An
*aten* graph holds overloads, whose schemas say more.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

# --- names ------------------------------------------------------------------------------------------------------


def op_name(node: fx.Node) -> str:
    """The op's name as its author would write it, in either dialect: `linear`, `tanh`, `add_`."""
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[-1]
    return getattr(node.target, "__name__", str(node.target)).strip("_") or str(node.target)


def qualified_name(node: fx.Node) -> str:
    """With the namespace, as in messages about aten graphs: `aten.mm`. What is no overload has none."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.replace("::", ".")
    return getattr(node.target, "__name__", str(node.target))


def aten_name(node: fx.Node) -> str | None:
    """The name of one of PyTorch's overloads, `mm`; `None` for any other op."""
    is_aten = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten"
    return op_name(node) if is_aten else None


def overload_name(node: fx.Node) -> str:
    """With the overload, as tables of aten ops need it: `add.Tensor`."""
    return str(node.target).removeprefix("aten.")


def is_pytorchs(function: Any) -> bool:
    """Whether a function is one of PyTorch's or Python's; those of a model's author may bear any name."""
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(function).startswith("aten.")
    module = getattr(function, "__module__", None) or "torch"
    return module.partition(".")[0] in ("torch", "_operator")


# --- arguments --------------------------------------------------------------------------------------------------


def argument(node: fx.Node, position: int, name: str = "", default: Any = None) -> Any:
    """One argument, given by keyword or by position."""
    return node.kwargs.get(name, node.args[position] if position < len(node.args) else default)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of an overload by their names in its schema, defaults filled in."""
    declared = node.target._schema.arguments  # type: ignore[union-attr]
    given = {argument.name: value for argument, value in zip(declared, node.args, strict=False)}
    return {argument.name: argument.default_value for argument in declared} | given | dict(node.kwargs)


def declared_writes(node: fx.Node) -> list[fx.Node]:
    """The nodes that an overload writes to, as its schema says; of an op given without its overload, as any says."""
    target: Any = node.target
    is_overload = isinstance(target, torch._ops.OpOverload)
    overloads = [target] if is_overload else [getattr(target, name) for name in target.overloads()]
    written = [
        argument(node, position, declared.name)
        for overload in overloads
        for position, declared in enumerate(overload._schema.arguments)
        if declared.alias_info is not None and declared.alias_info.is_write
    ]
    return list(dict.fromkeys(nodes_in(written)))


def is_mutable(node: fx.Node) -> bool:
    """Whether an overload writes to any of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def nodes_in(value: Any) -> Iterator[fx.Node]:
    """The nodes among arguments, however these are nested."""
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    yield from found


def lookup(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The table and the places of an op that takes rows of a table at places that a tensor of whole numbers names."""
    if node.target is F.embedding:
        places, table = argument(node, 0, "input"), argument(node, 1, "weight")
        options = argument(node, 3, "max_norm"), argument(node, 5, "scale_grad_by_freq"), argument(node, 6, "sparse")
        if any(options):
            return None
    elif node.target is operator.getitem:
        table, places = node.args
    else:
        return None
    if not isinstance(table, fx.Node) or not isinstance(places, fx.Node):
        return None
    value = places.meta.get("example_value")
    is_whole = isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64)
    is_table = isinstance(table.meta.get("example_value", torch.Tensor()), torch.Tensor)
    return (table, places) if is_whole and is_table else None


def hashable(value: Any, leaf: Callable[[Any], Any] = lambda one: one) -> Hashable:
    """Arguments as a key: 1, 1.0 and True are three. It has no hash if anything in it has none.

    Args:
        leaf: what stands for whatever is no tuple, list, dict or slice.
    """
    if isinstance(value, slice):
        return slice, *(hashable(item, leaf) for item in (value.start, value.stop, value.step))
    if isinstance(value, (tuple, list)):
        return type(value).__name__, *(hashable(item, leaf) for item in value)
    if isinstance(value, dict):
        return tuple((name, hashable(item, leaf)) for name, item in value.items())
    found = leaf(value)
    return type(found), found


# --- values -----------------------------------------------------------------------------------------------------


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of the tensor that a node of an aten graph makes; () for a number."""
    return tuple(int(size) for size in getattr(node.meta.get("val"), "shape", ()))
