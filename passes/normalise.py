"""Bring a captured graph to one form, where that provably changes nothing."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from pcr_fx.graphs.effects import (
    MULTIPLYING_DROPOUTS,
    dropout_noise,
    is_fresh,
    is_idle_dropout,
    is_inplace_variant,
    is_noise_like,
    is_random,
    writes,
)
from pcr_fx.graphs.nodes import argument, is_pytorchs, op_name

_FUNCTIONAL_OPERATORS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ipow: operator.pow,
    operator.imatmul: operator.matmul,
}


# Ops that do no more than compute or view, beside those that give fresh results. One that nobody reads would set its
# block apart from the others, or be taken for a reader of the block's inner values.
_VIEW_NAMES = frozenset(
    """chunk detach expand getitem permute reshape select split squeeze t transpose unbind unsqueeze var_mean view
    view_as""".split()
)
_CELL_NAMES = frozenset("lstm_cell".split())


def normalise_graph(graph: fx.Graph) -> None:
    """Remove what does nothing, and write in-place ops as ordinary ones where nobody can tell the difference."""
    for node in reversed(list(graph.nodes)):
        if not node.users and _only_computes(node):
            graph.erase_node(node)
    for node in list(graph.nodes):
        if is_idle_dropout(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    _read_tuples_once(graph)
    _draw_apart(graph)
    _free_from_values(graph)
    for node in list(graph.nodes):
        _take_all_results(node)
    position = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if _writes_unseen(node, position):
            _make_functional(node)


def _only_computes(node: fx.Node) -> bool:
    if not node.op.startswith("call_") or writes(node) or is_random(node):
        return False
    known = node.op == "call_method" or is_pytorchs(node.target)
    return known and (is_fresh(node) or op_name(node) in _VIEW_NAMES)


def _read_tuples_once(graph: fx.Graph) -> None:
    """Let all who read an item of a tuple read it once, before anything else happens: a tuple cannot change.

    `steps.scale[t]` in a loop is an item of another node in each block otherwise, and of one tensor then.
    """
    read: dict[Any, fx.Node] = {}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    latest: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if not _reads_tuple(node):
            continue
        source, item = node.args
        first = read.setdefault((node.target, source, item), node)
        if first is node:
            at = inputs[-1] if source.op == "placeholder" else source
            latest.get(at, at).append(node)
            latest[at] = node
        else:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _reads_tuple(node: fx.Node) -> bool:
    """Whether a node is an item of a tuple, by number or by name; a property may be computed anew each time."""
    if node.target not in (getattr, operator.getitem) or len(node.args) != 2 or not isinstance(node.args[0], fx.Node):
        return False
    source, item = node.args
    value = source.meta.get("example_value")
    if node.target is getattr:
        return isinstance(value, tuple) and item in getattr(type(value), "_fields", ())
    return isinstance(value, tuple) and type(item) is int


def _draw_apart(graph: fx.Graph) -> None:
    """Write dropout as a product with noise, which is drawn where dropout stood, and does not depend on what it multiplies."""
    for node in list(graph.nodes):
        if node.target not in MULTIPLYING_DROPOUTS or not is_random(node) or is_inplace_variant(node):
            continue
        dropped, p = argument(node, 0, "input"), argument(node, 1, "p", 0.5)
        value = dropped.meta.get("example_value") if isinstance(dropped, fx.Node) else None
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        with graph.inserting_before(node):
            noise = graph.call_function(dropout_noise, (dropped, p, node.target.__name__))
        noise.meta = dict(node.meta)
        node.target, node.args, node.kwargs = operator.mul, (dropped, noise), {}


def _free_from_values(graph: fx.Graph) -> None:
    """Let `randn_like(x)` take its shape from the first node that has the shape, strides, dtype and device of `x`.

    Noise that a denoising step draws in the shape of its state does not depend on the state.
    """
    first: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if is_noise_like(node.target) and node.args and isinstance(node.args[0], fx.Node):
            node.args = (first.get(_form(node.args[0]), node.args[0]), *node.args[1:])
        form = _form(node)
        if form is not None and node.op != "get_attr":
            first.setdefault(form, node)


def _take_all_results(node: fx.Node) -> None:
    """Have a cell that returns several tensors give out all of them: of the last one in a loop, not all may be read."""
    value = node.meta.get("example_value")
    if op_name(node) not in _CELL_NAMES or not isinstance(value, tuple):
        return
    if any(user.target is not operator.getitem for user in node.users):
        return
    taken = {user.args[1]: user for user in node.users}
    last = node
    for index, part in enumerate(value):
        if index not in taken:
            with node.graph.inserting_after(last):
                taken[index] = node.graph.call_function(operator.getitem, (node, index))
            taken[index].meta = {**node.meta, "example_value": part}
        last = taken[index]


def _form(node: fx.Node) -> Any:
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    return str((value.shape, value.stride(), value.dtype, value.device))


def _writes_unseen(node: fx.Node, position: dict[fx.Node, int]) -> bool:
    """Whether the op overwrites a fresh value that nobody reads afterwards, under any name."""
    written = writes(node)
    if len(written) != 1 or is_random(node) or "out" in node.kwargs:
        # An in-place random op may draw other numbers than the ordinary one.
        return False
    target = written[0]
    if not is_fresh(target) or not node.args or node.args[0] is not target:
        return False
    others = [user for user in target.users if user is not node]
    return all(position[user] < position[node] and is_fresh(user) for user in others)


def _make_functional(node: fx.Node) -> None:
    written = node.args[0]
    if node.target in _FUNCTIONAL_OPERATORS:
        node.target = _FUNCTIONAL_OPERATORS[node.target]
    elif node.op == "call_function" and is_inplace_variant(node):
        _switch_off_inplace(node)
        return
    elif node.op == "call_method" and callable(getattr(torch.Tensor, op_name(node).removesuffix("_"), None)):
        node.target = op_name(node).removesuffix("_")
    elif getattr(torch, f"{op_name(node)}_", None) is node.target and hasattr(torch, op_name(node)):
        node.target = getattr(torch, op_name(node))
    else:
        return
    if any(_dtype(value) is None or _dtype(value) != _dtype(written) for value in node.all_input_nodes):
        _keep_dtype(node, written)


def _switch_off_inplace(node: fx.Node) -> None:
    if "inplace" in node.kwargs:
        node.kwargs = {**node.kwargs, "inplace": False}
    else:
        # Given by position, `inplace` is the last argument of all these functions.
        node.args = (*node.args[:-1], False)


def _keep_dtype(node: fx.Node, written: Any) -> None:
    """An in-place op keeps the dtype of what it writes to, where an ordinary one would promote it."""
    with node.graph.inserting_after(node):
        kept = node.graph.call_method("type_as", (node, written))
    kept.meta = dict(node.meta)
    node.replace_all_uses_with(kept, delete_user_cb=lambda user: user is not kept)


def _dtype(node: Any) -> torch.dtype | None:
    return getattr(node.meta.get("example_value"), "dtype", None)
