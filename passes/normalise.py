"""Bring a captured graph to one form, where that provably changes nothing."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from pcr_fx.graphs.effects import (
    MULTIPLYING_DROPOUTS,
    dropout_noise,
    is_barrier,
    is_fresh,
    is_idle_dropout,
    is_inplace_variant,
    is_noise_like,
    is_random,
    writes,
    written_nodes,
)
from pcr_fx.graphs.nodes import argument, hashable, is_pytorchs, op_name
from pcr_fx.passes.completion import note_entry
from pcr_fx.passes.fold import fold_stretches
from pcr_fx.passes.varying_functions import take_numbers_over
from pcr_fx.passes.writes import write_out

# Ops that do no more than compute or view, beside those that give fresh results. One that nobody reads would set its
# block apart from the others, or be taken for a reader of the block's inner values.
_VIEW_NAMES = frozenset(
    """chunk detach expand expand_as getitem narrow permute reshape select split squeeze t transpose unbind unsqueeze var_mean view
    view_as""".split()
)
# How often a value is computed again at the least that is worth to be computed once.
_OFTEN = 4
_CELL_NAMES = frozenset("lstm_cell lstm gru rnn_tanh rnn_relu".split())


def normalise_graph(graph: fx.Graph) -> None:
    """Remove what does nothing, and write in-place ops as ordinary ones where nobody can tell the difference."""
    take_numbers_over(graph)
    fold_stretches(graph)
    write_out(graph)
    _join_at_once(graph)
    _remove_unread(graph)
    for node in list(graph.nodes):
        if is_idle_dropout(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    _compute_once(graph)
    _read_tuples_once(graph)
    _draw_apart(graph)
    _free_from_values(graph)
    for node in list(graph.nodes):
        _take_all_results(node)


def _remove_unread(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and _only_computes(node):
            note_entry(node)
            graph.erase_node(node)


def _join_at_once(graph: fx.Graph) -> None:
    """Write `torch.cat` of a `torch.cat` as one: a result that grows by a step at a time is joined when it is complete.

    What reads the last entry of such a result on the way reads the step that it was joined from.
    """
    for node in graph.nodes:
        for user in list(node.users) if _joined(node) is not None else []:
            _read_before_joining(user, node)
    gone = set[fx.Node]()
    for node in reversed(list(graph.nodes)):
        found = _joined(node)
        if found is not None and node not in gone:
            gone.update(_join_all(node, *found))


def _join_all(node: fx.Node, items: list[fx.Node], dim: int) -> list[fx.Node]:
    """Join at once what `node` joins of results that only it reads; those, which are no more."""
    pending, flat, inner = [(item, node) for item in items], list[fx.Node](), list[fx.Node]()
    while pending:
        item, joined = pending.pop()
        found = _joined(item)
        if (
            found is None
            or found[1] != dim
            or list(item.users) != [joined]
            or argument(joined, 0, "tensors").count(item) > 1
        ):
            flat.append(item)
            continue
        inner.append(item)
        pending += [(part, item) for part in found[0]]
    if inner:
        node.args, node.kwargs = (flat[::-1], dim), {}
    for item in inner:  # each behind those that it joined
        node.graph.erase_node(item)
    return inner


def _joined(node: Any) -> tuple[list[fx.Node], int] | None:
    """What `torch.cat` joins, along which dimension counted from the front."""
    if not isinstance(node, fx.Node) or node.target not in (torch.cat, torch.concat, torch.concatenate):
        return None
    items, dim, value = argument(node, 0, "tensors"), argument(node, 1, "dim", 0), node.meta.get("example_value")
    if not isinstance(items, (list, tuple)) or type(dim) is not int or "out" in node.kwargs:
        return None
    if dim < 0 and isinstance(value, torch.Tensor):
        dim += value.dim()
    return list(items), dim


def _read_before_joining(user: fx.Node, joined: fx.Node) -> None:
    """Have `x[..., -1]` of what was joined along that dimension read the last of the parts, if that has an entry."""
    items, dim = _joined(joined) or ([], 0)
    index = user.args[1] if user.target is operator.getitem and user.args[0] is joined else None
    entries = index if isinstance(index, tuple) else (index,)
    before = [entry == slice(None) for entry in entries[:dim] if isinstance(entry, slice)]
    last: Any = items[-1].meta.get("example_value") if items and isinstance(items[-1], fx.Node) else None
    reads = len(entries) > dim >= 0 and len(before) == dim and all(before) and type(entries[dim]) is int
    if reads and entries[dim] == -1 and isinstance(last, torch.Tensor) and last.dim() > dim and last.shape[dim] != 0:
        user.args = (items[-1], index)


def _compute_once(graph: fx.Graph) -> None:
    """Let what each step of a loop computes of parameters and inputs alone, always the same, be computed once before it."""
    if any(map(is_barrier, graph.nodes)):
        return
    written = written_nodes(graph)
    fixed = {node for node in graph.nodes if node.op in ("placeholder", "get_attr") and node not in written}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    # By what they compute, and for each node the first that does.
    alike: dict[Any, list[fx.Node]] = {}
    first: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        sources = node.all_input_nodes
        if not sources or not fixed.issuperset(sources) or node in written or not _only_computes(node):
            continue
        if any(user.op == "output" for user in node.users):
            continue  # what is returned twice is two tensors
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda one: first.get(one, one))
        try:
            same = alike.setdefault((node.op, node.target, hashable(args), hashable(kwargs)), [])
        except TypeError:
            continue
        fixed.add(node)
        same.append(node)
        first[node] = same[0]
    for known, *others in alike.values():
        if len(others) < _OFTEN:
            continue
        # Before the loop, so that its first step is like all others, which reads no attribute for the first time either.
        for source in known.all_input_nodes:
            if source.op == "get_attr" and inputs:
                inputs[-1].append(source)
        at = max(known.all_input_nodes)
        (inputs[-1] if at.op == "placeholder" else at).append(known)
        for node in others:
            node.replace_all_uses_with(known)
            graph.erase_node(node)


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


def tie_noise_to_neighbours(graph: fx.Graph) -> None:
    """Let noise take its shape from the last node before it that has it: the opposite of what a chain asks for.

    Blocks draw alike then, and none holds on to a tensor in front of all blocks.
    """
    last: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if is_noise_like(node.target) and node.args and isinstance(node.args[0], fx.Node):
            node.args = (last.get(_form(node.args[0]), node.args[0]), *node.args[1:])
        form = _form(node)
        if form is not None and node.op != "get_attr":
            last[form] = node


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
