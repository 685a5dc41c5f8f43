"""Stretches between an op that changes how others run and the one that changes it back, as one op each where they repeat.

Autocast that is switched within each block, `torch.no_grad` around a part of each step, `torch.func.grad` in a loop: no chain
reaches across such ops, but one of blocks that hold them whole is like any other.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from pcr_fx.graphs.effects import hides_ops, is_barrier, is_random, written_memory
from pcr_fx.graphs.hooks import HookOp
from pcr_fx.graphs.nodes import argument, op_name
from pcr_fx.graphs.parts import Part, part

# How often a stretch has to occur to become an op: others may hold chains themselves.
_OFTEN = 4
# By the op that opens a stretch: the one that closes it, and what reports call it.
_CLOSED_BY = {
    "enter_autocast": ("exit_autocast", "autocast"),
    "enter_inference_mode": ("exit_inference_mode", "inference_mode"),
    "grad_increment_nesting": ("grad_decrement_nesting", "grad"),
    "vmap_increment_nesting": ("vmap_decrement_nesting", "vmap"),
}
_CLOSING = {closing for closing, _ in _CLOSED_BY.values()}
_TRANSFORMS = ("grad", "vmap")
# Ops that set what was set before when they close a stretch, and what reports call it.
_SETTING = {
    "set_grad_enabled": "gradients",
    "saved_tensors_hooks_disable": "function_transform",
    "saved_tensors_hooks_enable": "function_transform",
}
# Which argument of an op is the number of a transform around it.
_LEVELS = {"wrap_for_grad": 1, "unwrap_for_grad": 1, "add_batch_dim": 2, "remove_batch_dim": 1}


@dataclass(eq=False)
class _Stretch:
    """The nodes from number `first` to number `last` of a graph, both included.

    Attributes:
        closing: the op that closes it, or none where that sets what was set before.
        before: what was set before.
        level: how many function transforms are around it.
        with_gradients: whether gradients are on before it.
        within: the stretches in it.
    """

    name: str
    closing: str
    first: int
    level: int
    with_gradients: bool
    before: Any = None
    last: int = -1
    within: list[_Stretch] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Folded:
    """A stretch as one op: which, what it takes, and the nodes whose values it returns."""

    part: Part
    inputs: Sequence[fx.Node]
    results: Sequence[fx.Node]


def fold_stretches(graph: fx.Graph) -> None:
    """Replace the stretches of a captured graph that repeat."""
    if not any(map(is_barrier, graph.nodes)):
        return
    _remove_idle(graph)
    nodes = list(graph.nodes)
    level = _stretches(nodes)
    # By op: all nodes that may lie in memory that it writes to.
    written = {writer: aliases for aliases, writers in written_memory(graph) for writer in writers}
    replaced: dict[fx.Node, fx.Node] = {}
    while level:
        _extend(nodes, level)
        made = {stretch: _folded(nodes[stretch.first : stretch.last + 1], stretch, written) for stretch in level}
        often = Counter(found.part for found in made.values() if found is not None)
        for stretch, found in made.items():
            if found is not None and often[found.part] >= _OFTEN:
                _replace(graph, nodes[stretch.first : stretch.last + 1], found, replaced)
                stretch.within = []
        level = [inner for stretch in level for inner in stretch.within]


def _remove_idle(graph: fx.Graph) -> None:
    """Remove what switches gradients or autocast to what they are already."""
    gradients = torch.is_grad_enabled()
    autocast: dict[Any, list[Any]] = {}
    idle: list[fx.Node] = []
    for node in graph.nodes:
        name = op_name(node) if is_barrier(node) else ""
        if name == "set_grad_enabled":
            if node.args[0] is gradients and not node.users:
                idle.append(node)
            gradients = node.args[0]
        elif name == "enter_autocast":
            device, dtype, enabled = (argument(node, index) for index in range(3))
            states = autocast.setdefault(device, [_autocast(device)])
            states.append((dtype or torch.get_autocast_dtype(device)) if enabled else None)
            if states[-1] == states[-2]:
                idle.append(node)
        elif name == "exit_autocast":
            autocast[argument(node.args[0], 0)].pop()  # type: ignore[arg-type]
    for node in idle:
        for user in list(node.users):
            graph.erase_node(user)
        graph.erase_node(node)


def _autocast(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _stretches(nodes: Sequence[fx.Node]) -> list[_Stretch]:
    """The outermost stretches in order; none where they do not lie within each other."""
    outermost: list[_Stretch] = []
    opened: list[_Stretch] = []
    settings: dict[str, Any] = {"gradients": torch.is_grad_enabled(), "function_transform": None}
    for index, node in enumerate(nodes):
        name = op_name(node) if is_barrier(node) else ""
        level = sum(stretch.name in _TRANSFORMS for stretch in opened)
        if name in _SETTING:
            word, value = _SETTING[name], argument(node, 0)
            if opened and opened[-1].name == word and opened[-1].before == value:
                _close(opened, outermost, index)
            else:
                opened.append(_Stretch(word, "", index, level, settings["gradients"], settings[word]))
            settings[word] = value
        elif name in _CLOSED_BY:
            closing, word = _CLOSED_BY[name]
            opened.append(_Stretch(word, closing, index, level, settings["gradients"]))
        elif name in _CLOSING:
            if not opened or opened[-1].closing != name:
                return []
            _close(opened, outermost, index)
        elif name.endswith("crement_nesting"):
            return []  # of tangents, say, which are counted by themselves
    return [] if opened else outermost


def _close(opened: list[_Stretch], outermost: list[_Stretch], index: int) -> None:
    stretch = opened.pop()
    stretch.last = index
    (opened[-1].within if opened else outermost).append(stretch)


def _extend(nodes: Sequence[fx.Node], level: Sequence[_Stretch]) -> None:
    """Let a stretch reach to the last op that differentiates its values: the pullback of `torch.func.vjp` is called behind it."""
    position = {node: index for index, node in enumerate(nodes)}
    for index, stretch in enumerate(level):
        users = {user for node in nodes[stretch.first : stretch.last + 1] for user in node.users}
        last = max((position[user] for user in users if op_name(user) == "autograd_grad"), default=stretch.last)
        if index + 1 == len(level) or last < level[index + 1].first:
            stretch.last = max(stretch.last, last)


def _folded(nodes: Sequence[fx.Node], stretch: _Stretch, written: Mapping[fx.Node, set[fx.Node]]) -> _Folded | None:
    """A stretch as one op, if it does no more than compute."""
    ops = [node for node in nodes if node.op not in ("get_attr", "placeholder")]
    inside = set(ops)
    if any(_does_more(node, written.get(node, set()) - inside) for node in ops):
        return None
    results = [node for node in ops if any(user not in inside for user in node.users)]
    graph, copies, transforms = fx.Graph(), dict[fx.Node, fx.Node](), list[fx.Node]()
    inputs = list(dict.fromkeys(source for node in ops for source in node.all_input_nodes if source not in inside))
    copies.update((node, graph.placeholder(f"input_{number}")) for number, node in enumerate(inputs))
    for node in ops:
        copy = copies[node] = graph.node_copy(node, copies.__getitem__)
        name = op_name(node)
        if name.endswith("increment_nesting"):
            transforms.append(copy)
        elif name.endswith("decrement_nesting"):
            transforms.pop()
        elif name in _LEVELS:
            # Under another transform it is another number.
            number = argument(node, _LEVELS[name]) - stretch.level - 1
            if not 0 <= number < len(transforms):
                return None
            copy.update_arg(_LEVELS[name], transforms[number])
    given = tuple(copies[node] for node in results)
    graph.output(given[0] if len(given) == 1 else given)
    try:
        return _Folded(part(graph, stretch.name, stretch.with_gradients), inputs, results) if results else None
    except TypeError:  # an argument that cannot be compared
        return None


def _does_more(node: fx.Node, written: set[fx.Node]) -> bool:
    """Whether an op draws random numbers, writes to these nodes or may do anything."""
    return is_random(node) or hides_ops(node) or isinstance(node.target, HookOp) or bool(written)


def _replace(graph: fx.Graph, nodes: Sequence[fx.Node], found: _Folded, replaced: dict[fx.Node, fx.Node]) -> None:
    """Put a part in place of its nodes; `replaced` are those that others have taken the place of."""
    inside = {node for node in nodes if node.op not in ("get_attr", "placeholder")}
    with graph.inserting_after(nodes[-1]):
        node = graph.call_function(found.part, tuple(replaced.get(one, one) for one in found.inputs))
    last = found.results[-1]
    node.meta = dict(last.meta)
    if len(found.results) == 1:
        last.replace_all_uses_with(node, lambda user: user not in inside)
        replaced[last] = node
    else:
        node.meta["example_value"] = tuple(result.meta.get("example_value") for result in found.results)
        before = node
        for index, result in enumerate(found.results):
            with graph.inserting_after(before):
                before = graph.call_function(operator.getitem, (node, index))
            before.meta = dict(result.meta)
            result.replace_all_uses_with(before, lambda user: user not in inside)
            replaced[result] = before
    for old in reversed(nodes):
        if old in inside:
            graph.erase_node(old)
