"""Write ops whose numbers change from block to block in sums, products and choices, which take them as tensors.

`torch.clamp(x, max=0.1 * i)` has a number where PyTorch wants one: no tensor can stand there beside another number. What it is
written out in computes the same, to the last bit or a rounding, has its derivatives, also where two branches meet, and keeps NaN.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor

from pcr_fx.graphs.nodes import argument, is_pytorchs, op_name


def write_numbers_out(nodes: Iterable[fx.Node]) -> bool:
    """Write out, in their graph, all ops like the given ones that there is a rule for; whether there was any."""
    kinds = {(node.op, node.target) for node in nodes if op_name(node) in _RULES and _is_known(node)}
    graphs = {node.graph for node in nodes}
    found = [node for graph in graphs for node in graph.nodes if (node.op, node.target) in kinds and _is_known(node)]
    return any([_write_out(node) for node in found])


def _is_known(node: fx.Node) -> bool:
    """Whether an op is PyTorch's, of one floating tensor."""
    value = node.meta.get("example_value")
    ours = node.op == "call_method" or is_pytorchs(node.target)
    is_plain = "out" not in node.kwargs and not node.kwargs.get("inplace")
    return ours and is_plain and isinstance(value, torch.Tensor) and value.is_floating_point()


def _write_out(node: fx.Node) -> bool:
    with node.graph.inserting_before(node):
        result = _RULES[op_name(node)](_Writer(node), node)
    if result is None:
        return False
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
    return True


class _Writer:
    """Ops in place of one, with what they compute of the examples at hand."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> fx.Node:
        made = self.node.graph.call_function(function, arguments)
        made.meta = dict(self.node.meta)
        examples = list(map(_example, arguments))
        with next((one.fake_mode for one in examples if isinstance(one, FakeTensor)), contextlib.nullcontext()):
            made.meta["example_value"] = function(*examples)
        return made


def _example(argument: Any) -> Any:
    return argument.meta["example_value"] if isinstance(argument, fx.Node) else argument


_Rule = Callable[[_Writer, fx.Node], "fx.Node | None"]


def _given(node: fx.Node, *names: str) -> list[Any]:
    """Arguments by position or name; of those that are not given, None."""
    return [argument(node, position, name) for position, name in enumerate(names)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# --- sums and products ---------------------------------------------------------------------------------------------------


def _scaled_sum(function: Callable[..., Any]) -> _Rule:
    """`a + alpha * b`."""

    def rule(write: _Writer, node: fx.Node) -> fx.Node | None:
        first, second = _given(node, "input", "other")
        alpha = node.kwargs.get("alpha")
        if not isinstance(second, fx.Node) or not _is_number(alpha):
            return None
        return write(function, first, write(operator.mul, second, alpha))

    return rule


def _scaled_term(combine: Callable[..., Any]) -> _Rule:
    """`a + value * (b op c)`."""

    def rule(write: _Writer, node: fx.Node) -> fx.Node | None:
        first, second, third = _given(node, "input", "tensor1", "tensor2")
        value = node.kwargs.get("value")
        if not isinstance(third, fx.Node) or not _is_number(value):
            return None
        return write(operator.add, first, write(operator.mul, write(combine, second, third), value))

    return rule


def _lerp(write: _Writer, node: fx.Node) -> fx.Node | None:
    start, end, weight = _given(node, "input", "end", "weight")
    if not _is_number(weight):
        return None
    # As PyTorch has it, from the nearer end: so both are what they are at their own weight, however large the other one.
    share = write(operator.mul, write(torch.ones_like, start), weight)
    change = write(operator.sub, end, start)
    from_start = write(operator.add, start, write(operator.mul, change, share))
    from_end = write(operator.sub, end, write(operator.mul, change, write(operator.sub, 1, share)))
    return write(torch.where, write(operator.lt, write(torch.abs, share), 0.5), from_start, from_end)


def _full_like(write: _Writer, node: fx.Node) -> fx.Node | None:
    like, value = _given(node, "input", "fill_value")
    if set(node.kwargs) - {"input", "fill_value"} or not _is_number(value):
        return None
    return write(operator.mul, write(torch.ones_like, like), value)


def _new_full(write: _Writer, node: fx.Node) -> fx.Node | None:
    like, size, value = _given(node, "input", "size", "fill_value")
    if node.op != "call_method" or len(node.args) != 3 or node.kwargs or not _is_number(value):
        return None
    return write(operator.mul, write(torch.Tensor.new_ones, like, size), value)


# --- choices ---------------------------------------------------------------------------------------------------------------


def _clamped(write: _Writer, x: fx.Node, low: Any, high: Any) -> fx.Node | None:
    """The derivative at a bound is that within; NaN lies on neither side, is kept, and has none."""
    if not all(bound is None or _is_number(bound) for bound in (low, high)):
        return None
    for bound, is_within, is_beyond in ((low, operator.ge, operator.lt), (high, operator.le, operator.gt)):
        if bound is not None:
            fixed = write(torch.where, write(is_beyond, x, bound), bound, write(torch.Tensor.detach, x))
            x = write(torch.where, write(is_within, x, bound), x, fixed)
    return x


def _clamp(write: _Writer, node: fx.Node) -> fx.Node | None:
    x, low, high = _given(node, "input", "min", "max")
    return _clamped(write, x, low, high)


def _clamp_min(write: _Writer, node: fx.Node) -> fx.Node | None:
    x, low = _given(node, "input", "min")
    return _clamped(write, x, low, None)


def _clamp_max(write: _Writer, node: fx.Node) -> fx.Node | None:
    x, high = _given(node, "input", "max")
    return _clamped(write, x, None, high)


def _hardtanh(write: _Writer, node: fx.Node) -> fx.Node | None:
    """The derivative at a bound is that beyond; that of NaN is that within."""
    x, low, high = _given(node, "input", "min_val", "max_val")
    low, high = -1.0 if low is None else low, 1.0 if high is None else high
    if not _is_number(low) or not _is_number(high):
        return None
    x = write(torch.where, write(operator.le, x, low), low, x)
    return write(torch.where, write(operator.ge, x, high), high, x)


def _masked_fill(write: _Writer, node: fx.Node) -> fx.Node | None:
    x, mask, value = _given(node, "input", "mask", "value")
    return write(torch.where, mask, value, x) if _is_number(value) else None


def _threshold(write: _Writer, node: fx.Node) -> fx.Node | None:
    x, least, value = _given(node, "input", "threshold", "value")
    if not _is_number(least) or not _is_number(value):
        return None
    return write(torch.where, write(operator.le, x, least), value, x)


def _leaky_relu(write: _Writer, node: fx.Node) -> fx.Node | None:
    x, slope = _given(node, "input", "negative_slope")
    if not _is_number(slope):
        return None
    return write(torch.where, write(operator.gt, x, 0), x, write(operator.mul, x, slope))


def _elu(write: _Writer, node: fx.Node) -> fx.Node | None:
    x, alpha = _given(node, "input", "alpha")
    if not _is_number(alpha):
        return None
    is_below = write(operator.le, x, 0)
    below = write(torch.expm1, write(torch.where, is_below, x, 0.0))  # no infinity where it is not chosen
    return write(torch.where, is_below, write(operator.mul, below, alpha), x)


def _softplus(write: _Writer, node: fx.Node) -> fx.Node | None:
    x, beta, threshold = _given(node, "input", "beta", "threshold")
    if not _is_number(beta) or threshold is not None:
        return None
    return write(operator.truediv, write(torch.nn.functional.softplus, write(operator.mul, x, beta)), beta)


_RULES: dict[str, _Rule] = {
    "add": _scaled_sum(operator.add),
    "sub": _scaled_sum(operator.sub),
    "addcmul": _scaled_term(operator.mul),
    "addcdiv": _scaled_term(operator.truediv),
    "lerp": _lerp,
    "full_like": _full_like,
    "new_full": _new_full,
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": _clamp_min,
    "clamp_max": _clamp_max,
    "hardtanh": _hardtanh,
    "masked_fill": _masked_fill,
    "threshold": _threshold,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "softplus": _softplus,
}
