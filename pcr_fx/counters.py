"""A `while_loop` that counts: where its condition compares a counter with a number, the number of steps is known before the first.

Such a loop is one of as many steps, each of which is given the counter as it is then, and what it reads there of other tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pcr_fx.errors import UnsupportedError
from pcr_fx.graphs.effects import written_nodes
from pcr_fx.graphs.nodes import op_name
from pcr_fx.marks import flat

# Comparisons under which a loop goes on, and what they are with their sides exchanged.
_EXCHANGED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}
_NUMBERS = (int, torch.SymInt)
_TO_VECTOR = frozenset("reshape view unsqueeze".split())
# What makes the same of a whole number and of a tensor that holds it: of whole numbers alone, and with real tensors.
_OF_NUMBERS = frozenset("add sub mul neg floordiv mod".split())
_WITH_TENSORS = frozenset("add sub mul truediv".split())


@dataclass(frozen=True)
class Counter:
    """What tells a loop when to end.

    Attributes:
        place: which of the values it is that the loop hands on.
        added: what each step adds to it.
        bound: what it is compared with; a tuple holds which input of the loop that is.
        includes: whether the loop goes on where both are equal.
        dtype: as a tensor; `None` where it is a number.
    """

    place: int
    added: int
    bound: Any
    includes: bool
    dtype: torch.dtype | None

    def steps(self, given: Sequence[Any]) -> range | None:
        """What it is in each step of a loop that is given this; `None` where its dtype does not hold what it would become."""
        start = int(given[self.place])
        bound = int(given[self.bound[0]] if isinstance(self.bound, tuple) else self.bound)
        beyond = int(self.includes) * (1 if self.added > 0 else -1)
        steps = range(start, bound + beyond, self.added)
        numbers = torch.iinfo(self.dtype or torch.int64)
        met = start, bound, self.after(steps)
        return steps if numbers.min <= min(met) and max(met) <= numbers.max else None

    def after(self, steps: range) -> int:
        """What it is after these."""
        return steps.start + len(steps) * steps.step


def find_counter(condition: fx.GraphModule, body: fx.GraphModule, num_carry: int) -> Counter:
    """What a `while_loop` counts by.

    Args:
        condition, body: its parts, called with the same: what is handed on, then what all steps are given whole.

    Raises:
        UnsupportedError: when it ends depends on data, or on what it is not told of here.
    """
    (compared,) = flat(condition.graph.output_node().args[0])
    inputs = condition.graph.find_nodes(op="placeholder")
    name = op_name(compared) if isinstance(compared, fx.Node) and compared.op.startswith("call_") else ""
    if name not in _EXCHANGED or len(compared.args) != 2 or written_nodes(condition.graph):
        raise UnsupportedError("its condition depends on data: it is no comparison of a counter with a number")
    left, right = compared.args
    for one, other, order in ((left, right, name), (right, left, _EXCHANGED[name])):
        added = _added(body, inputs.index(one)) if one in inputs[:num_carry] else 0
        if added and (added > 0) == (order in ("lt", "le")):
            place, bound = inputs.index(one), _bound(other, inputs, num_carry)
            value = one.meta.get("example_value")
            return Counter(place, added, bound, order in ("le", "ge"), getattr(value, "dtype", None))
    raise UnsupportedError(
        "its condition depends on data: neither side of it is a whole number to which each step adds the same"
    )


def _added(body: fx.GraphModule, place: int) -> int:
    """What a step adds to a whole number that is handed on; 0 if it is none, or something else becomes of it."""
    before, after = body.graph.find_nodes(op="placeholder")[place], flat(body.graph.output_node().args[0])[place]
    if not _is_whole(before.meta.get("example_value")) or not isinstance(after, fx.Node):
        return 0
    name, added = op_name(after), [one for one in after.args if type(one) is int]
    if (
        name not in ("add", "sub")
        or len(after.args) != 2
        or len(added) != 1
        or after.kwargs
        or before not in after.args
    ):
        return 0
    if name == "sub":
        return -added[0] if after.args[0] is before else 0
    return added[0]


def _bound(node: Any, inputs: Sequence[fx.Node], num_carry: int) -> Any:
    """What the counter is compared with, as `Counter` has it."""
    if type(node) is int:
        return node
    if node in inputs[num_carry:] and _is_whole(node.meta.get("example_value")):
        return (inputs.index(node),)
    raise UnsupportedError(
        "its condition depends on data: its counter is compared with no whole number that stays as it is"
    )


def _is_whole(value: Any) -> bool:
    """Whether it is one whole number, perhaps in a tensor."""
    if isinstance(value, Tensor):
        return (
            value.ndim == 0 and value.dtype is not torch.bool and not (value.is_floating_point() or value.is_complex())
        )
    return isinstance(value, _NUMBERS) and not isinstance(value, bool)


@dataclass(frozen=True)
class Rows:
    """What the steps read of an input of the loop at their counter: `tensor.select(dim, counter)`.

    Attributes:
        source: which input.
        keeps: whether the dimension stays, of size 1.
    """

    source: int
    dim: int
    keeps: bool

    def of(self, tensor: Tensor, steps: range) -> Tensor | None:
        """Those of all steps, `[steps, ...]`; `None` where there is not one for each, counted from the front."""
        first, last = min(steps[0], steps[-1]), max(steps[0], steps[-1])
        if first < 0 or last >= tensor.shape[self.dim]:
            return None
        rows = tensor.movedim(self.dim, 0)[first : last + 1 : abs(steps.step)]
        rows = rows if steps.step > 0 else rows.flip(0)
        return rows.unsqueeze(1 + self.dim % tensor.ndim) if self.keeps else rows


@dataclass(frozen=True)
class CountedStep:
    """A step of a loop that counts.

    Attributes:
        graph: called with all that is handed on but the counter, then the counter and the step's rows, then what all steps are
            given whole.
    """

    graph: fx.GraphModule
    counter: Counter
    rows: tuple[Rows, ...]


def find_counted_step(condition: fx.GraphModule, body: fx.GraphModule, num_carry: int) -> CountedStep:
    """The step of a `while_loop` that counts.

    Args:
        condition, body: as `find_counter` has them.

    Raises:
        UnsupportedError: it does not; or its steps hand on other numbers, write into what they are given, or take the counter for
            what no tensor is.
    """
    counter = find_counter(condition, body, num_carry)
    inputs, results = body.graph.find_nodes(op="placeholder"), flat(body.graph.output_node().args[0])
    others = [node for index, node in enumerate(inputs[:num_carry]) if index != counter.place]
    values = [node.meta.get("example_value") for node in others]
    if not others or not all(isinstance(value, Tensor) for value in values):
        raise UnsupportedError("it hands on numbers, or nothing beside its counter")
    if set(written_nodes(body.graph)) & set(inputs):
        raise UnsupportedError("its steps write into what they are given")
    counted = inputs[counter.place]
    read = {node: rows for node in body.graph.nodes if (rows := _rows(node, counted, inputs, num_carry)) is not None}
    if counter.dtype is None:
        _check_uses(counted, {results[counter.place], *read})
    graph = fx.Graph()
    copies = {node: graph.node_copy(node) for node in (*others, counted)}
    copies[counted].meta["example_value"] = values[0].new_empty((), dtype=counter.dtype or torch.int64)
    for number, node in enumerate(read):
        copies[node] = graph.placeholder(f"row_{number}")
        copies[node].meta = dict(node.meta)
    for node in body.graph.nodes:
        if node not in copies and node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[result] for index, result in enumerate(results) if index != counter.place))
    return CountedStep(fx.GraphModule(body, graph), counter, tuple(read.values()))


def _rows(node: fx.Node, counted: fx.Node, inputs: Sequence[fx.Node], num_carry: int) -> Rows | None:
    """What a node reads at the counter of a tensor that all steps are given whole, if it does no more than that."""
    if not node.op.startswith("call_") or node.kwargs or node.args[:1] == () or node.args[0] not in inputs[num_carry:]:
        return None
    source: Any = node.args[0]
    name, *where = op_name(node), *node.args[1:]
    if name == "getitem":
        where = [0, *where]
    if len(where) != 2 or type(where[0]) is not int or not isinstance(where[1], fx.Node):
        return None
    is_vector = where[1].args[:1] == (counted,) and op_name(where[1]) in _TO_VECTOR
    is_vector = is_vector and tuple(where[1].meta["example_value"].shape) == (1,)
    if (name == "select" and where[1] is counted) or (name in ("index_select", "getitem") and is_vector):
        return Rows(inputs.index(source), where[0], is_vector)
    return None


def _check_uses(number: fx.Node, others: set[Any]) -> None:
    """Raise where a tensor that holds it would be something else to what uses a number.

    Args:
        others: what does not get it.
    """
    for user in number.users:
        if user in others or user.op == "output":
            continue
        name, value = op_name(user), user.meta.get("example_value")
        is_real = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
        known = _WITH_TENSORS if is_real else _OF_NUMBERS if isinstance(value, _NUMBERS) else frozenset[str]()
        if user.kwargs or name not in known:
            raise UnsupportedError(
                f"its counter is a number that {name} takes; as a tensor, torch.tensor(0), it may be any"
            )
        if not is_real:
            _check_uses(user, others)
