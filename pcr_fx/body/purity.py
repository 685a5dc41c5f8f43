"""What a block may not do if it is to be evaluated in another order: draw random numbers, or write to its inputs."""

from __future__ import annotations

import torch
from torch import fx

from pcr_fx.errors import BodyError


def check_pure(block: fx.GraphModule) -> None:
    """Check a block's aten graph.

    Raises:
        BodyError: it is random, writes to an input, or updates running statistics.
    """
    for node in block.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = str(node.target).removesuffix(".default")
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise BodyError(f"random op {name}: every evaluation of the block would draw other numbers")
        if _updates_statistics(node):
            raise BodyError(f"{name} in training mode updates running statistics")
        if node.target._schema.is_mutable:
            for target in _written(node):
                root = _storage_owner(target)
                if root.op in ("placeholder", "get_attr"):
                    raise BodyError(f"mutation: {name} writes to an input of the block")


def _updates_statistics(node: fx.Node) -> bool:
    """Batch norm in training mode; the old overloads do not declare that they write to their statistics."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    if "batch_norm" not in str(node.target):
        return False
    names = [argument.name for argument in arguments]
    for flag in ("training", "train"):
        if flag in names:
            position = names.index(flag)
            value = node.args[position] if position < len(node.args) else node.kwargs.get(flag, False)
            return bool(value)
    return False


def _written(node: fx.Node) -> list[fx.Node]:
    written = []
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            written.extend(item for item in fx.node.map_aggregate([value], lambda x: x) if isinstance(item, fx.Node))
    return written


def _storage_owner(node: fx.Node) -> fx.Node:
    """The node whose storage `node` is a view of (itself when it is no view)."""
    while isinstance(node.target, torch._ops.OpOverload) or node.target is not None and node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        aliased = schema is None or any(result.alias_info is not None for result in schema.returns)
        inputs = node.all_input_nodes
        if not aliased or not inputs:
            return node
        node = inputs[0]
    return node
