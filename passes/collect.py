"""Hand over whole what is collected of a chain: `torch.stack` of its states is one copy of the trajectory, not L of them.

The backward is one cotangent of the trajectory likewise. This works on a rewritten graph, in which solve nodes return the
states that are read one by one.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from pcr_fx.body.wholes import whole_of_number
from pcr_fx.chain import Leaving, Place
from pcr_fx.graphs.nodes import argument, is_pytorchs, op_name
from pcr_fx.node import SolveNode
from pcr_fx.operands import collect, complete, complex_of_parts, stack_operands

# States in a row from which on they are not taken one by one.
_FEWEST = 4
_READERS = (complex_of_parts, whole_of_number)
# Whether ops that collect tensors join them along a dimension that there is.
_JOINS = {"stack": False, "cat": True, "concat": True, "concatenate": True}
# Ops that join tensors along a dimension of their own, from so many dimensions on: those with one less they stack there.
_BESIDE = {"hstack": (1, 2), "vstack": (0, 2), "row_stack": (0, 2), "column_stack": (1, 2), "dstack": (2, 3)}


@dataclass(frozen=True)
class _Tap:
    """A state that a solve node returns: the call, which of the chain's states, and after which block.

    Attributes:
        read_by: what makes the state of what the node returns, if it returns another thing: the parts of complex numbers, or
            numbers for truth values and whole ones; with its further arguments.
    """

    call: fx.Node
    index: int
    block: int
    read_by: Any = None


@dataclass(frozen=True)
class _Row:
    """States of one chain, `step` blocks apart."""

    taps: tuple[_Tap, ...]
    step: int


def collect_states(graph: fx.Graph, nodes: Mapping[str, SolveNode]) -> None:
    """Replace collections of states by parts of trajectories, in `graph` and in what `nodes` return.

    Args:
        graph: what `rewrite_chains` returned.
        nodes: its solve nodes by name.
    """
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target in nodes]
    taps: dict[fx.Node, _Tap] = {}
    for call in calls:
        for user in call.users:
            tap = taps[user] = _Tap(call, *nodes[str(call.target)].leaving.taps[user.args[1]])  # type: ignore[index]
            taps |= {
                one: replace(tap, read_by=(one.target, *one.args[1:])) for one in user.users if one.target in _READERS
            }
    wholes: dict[tuple[fx.Node, int], fx.Node] = {}
    for node in list(graph.nodes):
        _collect(node, taps, wholes)
    for call in calls:
        index_of = {node: index for (source, index), node in wholes.items() if source is call}
        if index_of:
            solve = nodes[str(call.target)]
            places = [_place(whole, solve.chain.length) for whole in index_of]
            solve.takes(_renumber(call, taps, index_of, places))


def _collect(node: fx.Node, taps: Mapping[fx.Node, _Tap], wholes: dict[tuple[fx.Node, int], fx.Node]) -> None:
    found = _collection(node)
    if found is None:
        return
    items, dim, joins = found
    rows = list(_rows(items, taps))
    if not any(isinstance(row, _Row) for row in rows):
        return
    parts = [_cut(row, wholes) if isinstance(row, _Row) else row for row in rows]
    with node.graph.inserting_before(node):
        collected = node.graph.call_function(collect, (parts, dim, joins))
    collected.meta = dict(node.meta)
    node.replace_all_uses_with(collected)
    node.graph.erase_node(node)


def _collection(node: fx.Node) -> tuple[Sequence[Any], int, bool] | None:
    """The tensors that an op collects, along which dimension, and whether it joins them."""
    if node.target is stack_operands:
        return node.args[0], 0, False  # type: ignore[return-value]
    if node.op != "call_function" or not is_pytorchs(node.target) or set(node.kwargs) - {"tensors", "dim"}:
        return None
    name, items = op_name(node), argument(node, 0, "tensors")
    if not isinstance(items, (list, tuple)):
        return None
    if name in _BESIDE:
        found = _beside(name, items)
        return None if found is None else (items, *found)
    dim = argument(node, 1, "dim", 0)
    return (items, dim, _JOINS[name]) if name in _JOINS and type(dim) is int else None


def _beside(name: str, items: Sequence[Any]) -> tuple[int, bool] | None:
    """Along which dimension an op like `hstack` collects tensors, and whether it joins them there; `None` if that is not known."""
    values = [item.meta.get("example_value") if isinstance(item, fx.Node) else None for item in items]
    ranks = {value.dim() if isinstance(value, torch.Tensor) else None for value in values}
    rank = ranks.pop() if len(ranks) == 1 else None
    dim, least = _BESIDE[name]
    if name == "hstack" and rank == 1:  # vectors it joins
        return 0, True
    if rank is None or rank < least - 1:
        return None
    return dim, rank >= least


def _rows(items: Sequence[Any], taps: Mapping[fx.Node, _Tap]) -> Iterator[_Row | fx.Node]:
    """The items in order, with rows in place of states that are regular."""
    at = 0
    while at < len(items):
        row = _row(items, at, taps)
        if row is not None and len(row.taps) >= _FEWEST:
            yield row
            at += len(row.taps)
        else:
            yield items[at]
            at += 1


def _row(items: Sequence[Any], at: int, taps: Mapping[fx.Node, _Tap]) -> _Row | None:
    """The longest row of states that begins at an item."""
    first, second = (taps.get(items[index]) if index < len(items) else None for index in (at, at + 1))
    if first is None or second is None or (second.call, second.index) != (first.call, first.index):
        return None
    step, row = second.block - first.block, [first]
    while at + len(row) < len(items) and step:
        if taps.get(items[at + len(row)]) != replace(first, block=row[-1].block + step):
            break
        row.append(taps[items[at + len(row)]])
    return _Row(tuple(row), step)


def _cut(row: _Row, wholes: dict[tuple[fx.Node, int], fx.Node]) -> tuple[fx.Node, int, int, int]:
    """A row as a part of a trajectory."""
    first = row.taps[0]
    key = first.call, first.index
    if key not in wholes:
        with first.call.graph.inserting_after(first.call):
            wholes[key] = first.call.graph.call_function(operator.getitem, (first.call, len(wholes)))
    whole = _read_by(first.read_by, wholes[key]) if first.read_by is not None else wholes[key]
    return whole, first.block, len(row.taps), row.step


def _read_by(reader: Any, whole: fx.Node) -> fx.Node:
    """A trajectory of the solve node's as one of the states."""
    for user in whole.users:
        return user
    with whole.graph.inserting_after(whole):
        return whole.graph.call_function(reader[0], (whole, *reader[1:]))


def _place(whole: fx.Node, length: int) -> Place | None:
    """Where a trajectory stands in what it is collected in, if that is one result with all of it in order.

    The result is then what the solve node returns.
    """
    collected, *others = whole.users
    if collected.target in _READERS:
        return None
    parts, dim, joins = collected.args
    at = [index for index, part in enumerate(parts) if isinstance(part, tuple) and part[0] is whole]  # type: ignore[union-attr,arg-type]
    rows = [part for part in parts if isinstance(part, tuple)]  # type: ignore[union-attr]
    if others or len(rows) > 1 or rows[0][1:] != (0, length, 1) or (joins and len(parts) > 1):  # type: ignore[arg-type]
        return None
    before, after = parts[: at[0]], parts[at[0] + 1 :]  # type: ignore[index]
    collected.target, collected.args = complete, (whole, before, after, dim, joins)
    return Place(dim, joins, len(before), len(after))  # type: ignore[arg-type]


def _renumber(
    call: fx.Node, taps: Mapping[fx.Node, _Tap], index_of: Mapping[fx.Node, int], places: Sequence[Place | None]
) -> Leaving:
    """Have the users of a solve node read what it is to return, which is what it is told."""
    for user in list(taps):
        if user.target in _READERS and user.args[0] in call.users and not user.users:
            call.graph.erase_node(user)
    singles = [user for user in call.users if user in taps and user.users]
    for user in [user for user in call.users if user in taps and not user.users]:
        call.graph.erase_node(user)
    for position, user in enumerate([*index_of, *singles]):
        user.args = (call, position)
    return Leaving(
        tuple((taps[user].index, taps[user].block) for user in singles), tuple(index_of.values()), tuple(places)
    )
