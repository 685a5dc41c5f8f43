"""Truth values and whole numbers among reals: which ops keep them what they are, and how large they can get.

A kernel computes in one real dtype, in which truth values are 0 and 1, and whole numbers are exact while they are small.
A result has its own dtype's arithmetic: where it would not be exact, or would wrap, no kernel is printed.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pcr_fx.codegen.ir import Apply, Constant, Expression, Unprintable
from pcr_fx.graphs.nodes import arguments_of, nodes_in, op_name

# Dtypes whose every number is a real of any dtype that kernels compute in.
SMALL = (torch.bool, torch.uint8, torch.int8, torch.int16)
WHOLE = (*SMALL, torch.int32, torch.int64)
# Ops that move numbers, or choose among them.
_CHOOSING = set(
    """alias detach view _unsafe_view t transpose permute unsqueeze squeeze select slice diagonal split split_with_sizes
    unbind unfold expand clone lift_fresh_copy where maximum minimum amax amin cat flip slice_scatter select_scatter
    diagonal_scatter constant_pad_nd _to_copy copy""".split()
)
# Ops that make a tensor of one number, or of 0 and 1.
_FILLING = set(
    """full full_like new_full scalar_tensor fill zeros zeros_like new_zeros ones ones_like new_ones empty_like new_empty
    new_empty_strided empty_permuted empty eye""".split()
)
# Ops that choose among the numbers of their first argument by a second one, or write those of a third one there.
_INDEXING = set("index _unsafe_index gather scatter index_put _unsafe_index_put".split())
_COMPARING = {"eq", "ne", "lt", "le", "gt", "ge"}
_LOGICAL = {
    "isnan",
    "logical_and",
    "logical_or",
    "logical_not",
    "bitwise_and",
    "bitwise_or",
    "bitwise_not",
    "mul",
    "sum",
}
# Ops that make other numbers of truth values, all of which but 0 are true.
_SATURATING = {"add", "_to_copy"}
_TRUTHFUL = _CHOOSING | _INDEXING | _FILLING | _COMPARING | _LOGICAL | _SATURATING
# Up to how large a whole number each op makes of such, by the arguments of its schema.
_SIZES: dict[str, Callable[..., float]] = {
    "add": lambda a, b, alpha: a + alpha * b,
    "sub": lambda a, b, alpha: a + alpha * b,
    "rsub": lambda a, b, alpha: alpha * a + b,
    "mul": lambda a, b: a * b,
    "remainder": lambda a, b: max(b - 1, 0),
    "pow": lambda a, b: max(a, 1) ** b,
    "clamp": max,
    "clamp_min": max,
    "clamp_max": max,
    **{name: lambda a: a for name in ("neg", "abs", "relu", "sign")},
}
# Of these a zero may come out as -0, which is no whole number.
_SIGNED = {"mul", "neg", "pow"}
_SUBTRACTING = {"neg", "rsub", "sub"}


def as_number(value: Any, dtype: torch.dtype) -> float:
    """A number of the code as PyTorch writes it into a tensor of `dtype`: whole ones are cut off."""
    if dtype == torch.bool:
        return float(bool(value))
    if dtype.is_floating_point:
        return float(value)
    if not math.isfinite(value):
        raise Unprintable(f"no kernel is printed for {value} as {dtype}")
    return float(int(value))


def _largest(dtype: torch.dtype) -> float:
    """The largest absolute value of a whole number."""
    return float(max(torch.iinfo(dtype).max, -torch.iinfo(dtype).min))


def _bounds(node: fx.Node) -> tuple[Any, Any]:
    """Of a clamp."""
    given = arguments_of(node)
    return given["min"], given["max"]


def _cut_off(value: Expression) -> Expression:
    """A real as a whole number of 64 bits, as processors have it: of NaN, and of what is too large, they make the least one."""
    least = Constant(-(2.0**63))
    whole = Apply("add", (Apply("trunc", (value,)), Constant(0.0)))
    return Apply("where", (Apply("lt", (Apply("abs", (value,)), Constant(2.0**63))), whole, least))


def as_truth(value: Expression) -> Expression:
    return Apply("ne", (value, Constant(0.0)))


class WholeNumbers:
    """The truth values and whole numbers of one graph.

    Args:
        real: the dtype that the kernel computes in.
    """

    def __init__(self, real: torch.dtype) -> None:
        self.real = real
        # Up to here every whole number is a real of this dtype.
        self.exact = 2 / torch.finfo(real).eps
        self.sizes: dict[fx.Node, float] = {}

    def check(self, node: fx.Node) -> None:
        """Whether a kernel can compute the result of an op, given the ops before it.

        Raises:
            Unprintable: it cannot; the message names the op.
        """
        values = node.meta["val"]
        for value in values if isinstance(values, (tuple, list)) else [values]:
            if value.dtype not in (self.real, *WHOLE):
                raise self._refused(node, f"of {value.dtype} beside {self.real}")
            if value.dtype != self.real:
                self._check_whole(node, value.dtype)
        if op_name(node) in _COMPARING:
            self._check_comparison(node)

    def take_constant(self, node: fx.Node, value: Tensor) -> None:
        """Take note of a tensor that is the same in every call."""
        if value.dtype in WHOLE:
            self.sizes[node] = float(value.abs().max()) if value.numel() and value.dtype != torch.bool else 1.0

    def check_constant(self, node: fx.Node, dtype: torch.dtype) -> None:
        """Whether a kernel can hold a tensor that is the same in every call.

        Raises:
            Unprintable: its numbers are none of the kernel's dtype.
        """
        if dtype not in (self.real, *WHOLE) or (dtype in WHOLE and self.sizes[node] > self.exact):
            raise Unprintable(f"no kernel is printed for constants of {dtype} beside {self.real}")

    def take(self, node: fx.Node) -> None:
        """Take note of an input, or one part of a result with several."""
        if node.op == "call_function":
            self.sizes[node] = self._magnitude(node.args[0])
        elif (dtype := node.meta["val"].dtype) in WHOLE:
            size = 1.0 if dtype == torch.bool else _largest(dtype)
            if dtype in SMALL or size <= self.exact:
                self.sizes[node] = size

    def kept(self, node: fx.Node, expression: Expression) -> Expression:
        """What an op computes, made what its dtype has."""
        name, dtype = op_name(node), node.meta["val"].dtype
        if dtype == torch.int64 and self._is_cut_off(node):
            return _cut_off(expression)
        if dtype == torch.bool and name in _SATURATING:
            return as_truth(expression)
        if dtype == torch.int64 and name in _SIGNED:
            return Apply("add", (expression, Constant(0.0)))
        return expression

    def _check_whole(self, node: fx.Node, dtype: torch.dtype) -> None:
        name = op_name(node)
        if dtype == torch.bool:
            chosen = [argument.meta["val"].dtype for argument in _chosen(node)]
            if name not in _TRUTHFUL or any(other != dtype for other in chosen if name != "_to_copy"):
                raise self._refused(node, f"of {dtype}")
            self.sizes[node] = 1
            return
        if dtype == torch.int64 and self._is_cut_off(node):
            return
        size = self._size(node, name)
        if size is None or (dtype == torch.uint8 and _may_be_negative(node, name)):
            raise self._refused(node, f"of {dtype}")
        # What only hands on numbers of its dtype makes none that this has not; -128 has no negative as an int8.
        sources = _chosen(node)
        hands_on = bool(sources) and all(source.meta["val"].dtype == dtype for source in sources)
        if size > min(self.exact, _largest(dtype) if hands_on else torch.iinfo(dtype).max):
            raise self._refused(node, f"of {dtype} which may not be exact in {self.real}")
        self.sizes[node] = size

    def _is_cut_off(self, node: fx.Node) -> bool:
        """Whether an op makes whole numbers of any reals, all of which are brought between two numbers then."""
        is_conversion = op_name(node) == "_to_copy" and node.all_input_nodes[0].meta["val"].dtype == self.real
        return is_conversion and all(op_name(user) == "clamp" and None not in _bounds(user) for user in node.users)

    def _size(self, node: fx.Node, name: str) -> float | None:
        """Up to how large the whole numbers are that an op makes; `None` where it may make others."""
        given = arguments_of(node)
        if name in _FILLING:
            return max([1.0, *(self._magnitude(given[key]) for key in ("fill_value", "value", "s") if key in given)])
        if name in _CHOOSING | _INDEXING:
            value = given.get("value")
            return max(
                [*map(self._magnitude, _chosen(node)), 0.0 if isinstance(value, fx.Node) else self._magnitude(value)]
            )
        if name == "clamp" and None not in _bounds(node):
            return max(map(self._magnitude, _bounds(node)))
        if name in ("argmax", "argmin"):
            return float(given["self"].meta["val"].numel())
        if name == "sum":
            return self._magnitude(given["self"]) * given["self"].meta["val"].numel() / max(node.meta["val"].numel(), 1)
        return _SIZES[name](*map(self._magnitude, given.values())) if name in _SIZES else None

    def _magnitude(self, argument: Any) -> float:
        if isinstance(argument, fx.Node):
            return self.sizes.get(argument, math.inf)
        return 0.0 if argument is None else abs(float(argument))

    def _check_comparison(self, node: fx.Node) -> None:
        """Whether the numbers of a comparison are compared as PyTorch compares them: in the dtype that both promote to."""
        compared = [_stand_in(argument) for argument in node.args]
        dtype = torch.result_type(*compared)  # type: ignore[arg-type]
        if dtype.is_floating_point and dtype != self.real:
            raise self._refused(node, f"in {dtype} beside {self.real}")
        if not dtype.is_floating_point and max(map(self._magnitude, node.args)) > self.exact:
            raise self._refused(node, f"of {dtype} which may not be exact in {self.real}")

    def _refused(self, node: fx.Node, why: str) -> Unprintable:
        return Unprintable(f"no kernel is printed for {node.target} {why}")


def sizes_of(graph: fx.GraphModule, real: torch.dtype, given: Sequence[float | None]) -> list[float]:
    """Up to how large the whole numbers are that an aten graph returns, infinite where that is not known.

    Args:
        real: the dtype in which they are to be exact.
        given: up to how large its first inputs are, of those that are whole numbers.
    """
    whole, sizes = WholeNumbers(real), iter(given)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            whole.take(node)
            if (size := next(sizes, None)) is not None:
                whole.sizes[node] = size
        elif node.op == "get_attr":
            whole.take_constant(node, getattr(graph, str(node.target)))
        elif node.target is operator.getitem:
            whole.take(node)
        elif node.op == "call_function":
            with contextlib.suppress(Unprintable, AttributeError):  # of several results, or of none of ours
                whole.check(node)
    results: Any = graph.graph.output_node().args[0]
    return [whole.sizes.get(one, math.inf) for one in results[: len(given)]]


def _chosen(node: fx.Node) -> list[fx.Node]:
    """The arguments whose numbers an op chooses among, if it is one that chooses."""
    if op_name(node) not in _CHOOSING | _INDEXING:
        return []
    given = arguments_of(node)
    return list(nodes_in([value for name, value in given.items() if name not in ("condition", "index", "indices")]))


def _may_be_negative(node: fx.Node, name: str) -> bool:
    """Whether an op may compute a number below zero, which a dtype without a sign has not."""
    given = arguments_of(node)
    moves = name in _CHOOSING | _INDEXING | _FILLING
    numbers = [given.get(key) for key in ("value", "fill_value", "s")] if moves else given.values()
    sources = _chosen(node) if moves else nodes_in(list(given.values()))
    return (
        name in _SUBTRACTING
        or any(isinstance(one, (int, float)) and one < 0 for one in numbers)
        or any(source.meta["val"].dtype not in (torch.bool, torch.uint8) for source in sources)
    )


def _stand_in(argument: Any) -> Tensor | float:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument
