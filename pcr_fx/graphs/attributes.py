"""The attributes of a model that its graph reads, by path."""

from __future__ import annotations

from typing import Any

from torch import fx, nn


def attributes_of(root: nn.Module, graph: fx.Graph) -> dict[str, Any]:
    """The value of everything that `graph` reads from `root`, by path."""
    return {str(node.target): attribute(root, str(node.target)) for node in graph.find_nodes(op="get_attr")}


def values_of(root: nn.Module, graph: fx.Graph) -> dict[fx.Node, Any]:
    """The same by the nodes that read it."""
    found = attributes_of(root, graph)
    return {node: found[str(node.target)] for node in graph.find_nodes(op="get_attr")}


def attribute(root: nn.Module, path: str) -> Any:
    """`root.a.b.c`, past `Module.__getattr__`, which a tracer at work has replaced.

    Raises:
        AttributeError: there is none.
    """
    holder, name = holder_of(root, path)
    return getattr(holder, name) if isinstance(holder, nn.Module) else holder[name]


def holder_of(root: nn.Module, path: str) -> tuple[Any, str]:
    """What keeps an attribute, and its name there: a module's dict of parameters, buffers, modules or other attributes.

    An attribute that no instance keeps, such as one of a class, is kept by the module itself.
    """
    *modules, name = path.split(".")
    for module in modules:
        root = attribute(root, module)
    for holder in (root._parameters, root._buffers, root._modules, root.__dict__):
        if name in holder:
            return holder, name
    return root, name
