"""What a block may not do if it is to be evaluated in another order: draw random numbers, or write to its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from pcr_fx.errors import BodyError


def check_pure(block: fx.GraphModule) -> None:
    """Check a block's aten graph.

    Raises:
        BodyError: it is random, writes to an input, updates running statistics, or has ops without a result, of which
            nobody knows what they do.
    """
    owner = _storage_owners(block.graph)
    for node in block.graph.nodes:
        if not isinstance(node.target, OpOverload):
            continue
        name = str(node.target).removesuffix(".default")
        if not node.target._schema.returns:
            raise BodyError(f"{name} returns nothing")
        if _is_random(node):
            raise BodyError(f"random op {name}: every evaluation of the block would draw other numbers")
        if _updates_statistics(node):
            raise BodyError(f"{name} in training mode updates running statistics")
        if any(owner[written].op in ("placeholder", "get_attr") for written in _written(node)):
            raise BodyError(f"mutation: {name} writes to an input of the block")


def _is_random(node: fx.Node) -> bool:
    """Attention is tagged as random for the dropout that it could do."""
    if torch.Tag.nondeterministic_seeded not in node.target.tags:  # type: ignore[union-attr]
        return False
    could_drop = any(argument.name == "dropout_p" for argument in node.target._schema.arguments)  # type: ignore[union-attr]
    return not could_drop or bool(_arguments(node).get("dropout_p"))


def _updates_statistics(node: fx.Node) -> bool:
    """Batch norm in training mode; its old overloads do not declare that they write to their statistics.

    Without running statistics it writes nothing: instance norm is written so.
    """
    given = _arguments(node)
    training = any(given.get(flag) for flag in ("training", "train"))
    return "batch_norm" in str(node.target) and training and given.get("running_mean") is not None


def _written(node: fx.Node) -> list[fx.Node]:
    """The tensors that an op writes to."""
    given = _arguments(node)
    written: list[fx.Node] = []
    for argument in node.target._schema.arguments:  # type: ignore[union-attr]
        if argument.alias_info is not None and argument.alias_info.is_write:
            fx.node.map_arg(given.get(argument.name), written.append)
    return written


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The op's arguments by name."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _storage_owners(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For each node the one whose memory it is a view of: itself, when it is no view."""
    owner: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        # What has no schema is `getitem` on the results of an op that may have returned views.
        view = node.op == "call_function" and (
            schema is None or any(result.alias_info is not None for result in schema.returns)
        )
        inputs = node.all_input_nodes
        owner[node] = owner[inputs[0]] if view and inputs else node
    return owner
