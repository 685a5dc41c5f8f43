"""Sizes that a forward reads and only hands on: a graph that takes them anew at each call is for any of them.

`batch, length, _ = x.shape` reads all three, but the batch may be asked for nothing else than `zeros(batch, 16)`.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from pcr_fx.graphs.nodes import argument, op_name

# Ops that may get sizes which are not known: those that make the first state. Python's numbers are what all others get.
_FUNCTIONS = frozenset({torch.zeros, torch.ones, torch.empty, torch.full})
_METHODS = frozenset("new_zeros new_ones new_empty new_full expand repeat".split())
_FILLED = frozenset({torch.full, "new_full"})


class OpenSize(torch.SymInt):
    """A size that was read. Whoever wants to know it is told, as if it were an `int`, and a listener as well.

    PyTorch takes a `SymInt` where it takes a size, without asking what it is, and hands it to who records ops.

    Args:
        value: the size.
        listener: what is called when it is asked for.
        source: the node of the tensor whose size it is, and the dimension.
    """

    def __init__(self, value: int, listener: Callable[[], Any], source: tuple[fx.Node, int]) -> None:
        self.value, self.listener, self.source = value, listener, source

    def asked(self) -> int:
        """The size, asked for."""
        self.listener()
        return self.value

    @property
    def node(self) -> Any:
        """What C++ would ask for the size, in ops that are run and not recorded."""
        raise TypeError("an op of PyTorch that is not recorded is given a size of a tensor; pass it as int(size)")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # PyTorch looks whether it overrides functions
            raise AttributeError(name)
        return getattr(self.asked(), name)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray[Any, Any]:
        return np.array(self.asked(), *args, **kwargs)

    def __reduce__(self) -> Any:
        return int, (self.asked(),)


def _answer_as_a_number(name: str, is_reflected: bool = False) -> None:
    compute = getattr(operator, name.strip("_"), None) or getattr(builtins, name.strip("_"), None) or getattr(int, name)

    def method(self: OpenSize, *others: Any) -> Any:
        given = self.asked(), *closed(others)
        return compute(*(reversed(given) if is_reflected else given))

    method.__name__ = f"__r{name[2:]}" if is_reflected else name
    setattr(OpenSize, method.__name__, method)


_BINARY = "add and divmod floordiv lshift mod mul or pow rshift sub truediv xor".split()
for _name in _BINARY:
    _answer_as_a_number(f"__{_name}__")
    _answer_as_a_number(f"__{_name}__", is_reflected=True)
for _name in (
    """abs bool ceil eq float floor format ge gt hash index int invert le lt ne neg pos repr round str trunc""".split()
):
    _answer_as_a_number(f"__{_name}__")


def closed(value: Any) -> Any:
    """A value with numbers in place of open sizes."""
    return pytree.tree_map_only(OpenSize, OpenSize.asked, value)


def may_stay_open(target: Any, args: Any, kwargs: Any) -> bool:
    """Whether an op takes open sizes as they are."""
    if target not in _FUNCTIONS and target not in _METHODS:
        return False
    fill = args[-1] if target in _FILLED and args else None
    return not isinstance(fill, OpenSize) and not isinstance(kwargs.get("fill_value"), OpenSize)


def is_argument(node: fx.Node) -> bool:
    """Whether a node is an argument or attribute, or what one of them holds in a tuple, a list or a dict."""
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.target is not operator.getitem:
        return False
    whole: Any = node.args[0]
    return isinstance(whole.meta.get("example_value"), (tuple, list, dict)) and is_argument(whole)


def place_in_argument(node: fx.Node, dim: int) -> tuple[fx.Node, int] | None:
    """The argument or attribute, and its dimension, that a dimension of one of its parts is; `None` where that is not known.

    What only the first step of a recurrence makes has to stand before its first step, so it may not hang on a part of that.
    """
    while not is_argument(node):
        whole: Any = node.args[0] if node.args else None
        if op_name(node) == "select" or (node.target is operator.getitem and op_name(whole) == "unbind"):
            selecting = node if op_name(node) == "select" else whole
            whole = selecting.args[0]
            removed = argument(selecting, 1, "dim", 0) % whole.meta["example_value"].dim()
            node, dim = whole, dim + (dim >= removed)
            continue
        if node.target is not operator.getitem or not isinstance(whole.meta["example_value"], Tensor):
            return None
        index: Any = node.args[1]
        kept = _dimensions_kept(index if isinstance(index, tuple) else (index,), whole.meta["example_value"].dim())
        found = None if kept is None else kept[dim]
        if found is None:
            return None
        node, dim = whole, found
    return node, dim


def _dimensions_kept(indices: tuple[Any, ...], rank: int) -> list[int | None] | None:
    """For each dimension of `whole[indices]` the one of `whole` that it is, uncut; `None` for indices of other kinds.

    Uncut is what is so for every size: `x[:4]` cuts a fifth row, though there may be three.
    """
    kept: list[int | None] = []
    taken = 0
    for index in indices:
        if type(index) is int:
            taken += 1
        elif isinstance(index, slice):
            kept.append(taken if index == slice(None) else None)
            taken += 1
        else:
            return None
    return [*kept, *range(taken, rank)]


def close_what_repeats(
    graph: fx.Graph, sizes: Mapping[tuple[fx.Node, int], tuple[fx.Node, OpenSize]], lines: Mapping[str, int]
) -> None:
    """Put numbers in place of sizes that a line of the model uses again and again: the body of a chain takes none.

    Args:
        sizes: the nodes that take sizes at each call, by what they are the sizes of.
        lines: how many ops that may take sizes each line has made.
    """
    for node, size in sizes.values():
        for user in list(node.users):
            if lines[user.meta["stack_trace"]] > 1:
                user.replace_input_with(node, size.asked())  # type: ignore[arg-type]
        if not node.users:
            graph.erase_node(node)
