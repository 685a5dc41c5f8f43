"""What a block may not do if it is to be evaluated in another order: draw random numbers, or write to its inputs."""

from __future__ import annotations

from torch import fx
from torch._ops import OpOverload

from pcr_fx.errors import BodyError
from pcr_fx.graphs.effects import is_random, updates_statistics
from pcr_fx.graphs.nodes import declared_writes


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
        if is_random(node):
            raise BodyError(f"random op {name}: every evaluation of the block would draw other numbers")
        if updates_statistics(node):
            raise BodyError(f"{name} in training mode updates running statistics")
        if any(owner[written].op in ("placeholder", "get_attr") for written in declared_writes(node)):
            raise BodyError(f"mutation: {name} writes to an input of the block")


def check_drawless(pullback: fx.GraphModule) -> None:
    """Check the aten graph of a block's pullback, which a function with a derivative of its own may have written.

    Raises:
        BodyError: it is random.
    """
    drawing = next(filter(is_random, pullback.graph.nodes), None)
    if drawing is not None:
        raise BodyError(f"random op {drawing.target} in a backward: it would draw in another order")


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
