"""What each aten op is in the language of kernels. An op without a rule here has no kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx

from pcr_fx.codegen import indexing
from pcr_fx.codegen.functions import FUNCTIONS
from pcr_fx.codegen.ir import (
    Apply,
    Buffer,
    Constant,
    Expression,
    Load,
    Unprintable,
    Value,
    View,
    contiguous,
    in_memory,
    map_views,
    views,
)
from pcr_fx.codegen.whole import as_number, as_truth
from pcr_fx.graphs.nodes import arguments_of

if TYPE_CHECKING:
    from pcr_fx.codegen.lower import Lowering


class Rule(NamedTuple):
    """How an op is lowered.

    Attributes:
        build: the value, or values, of a node.
        computes_arguments: whether it reads each number of its arguments once, so that it may as well compute them on the
            way: they need not be in memory.
    """

    build: Callable[[Lowering, fx.Node], Any]
    computes_arguments: bool = False


# --- views: PyTorch tells their strides ------------------------------------------------------------------------


def _view(lowering: Lowering, node: fx.Node) -> Any:
    return lowering.view(node, lowering.tensor(node.args[0]))


def _expanded(lowering: Lowering, node: fx.Node) -> Any:
    """What is read many times is to be in memory."""
    return lowering.view(node, lowering.loaded(lowering.tensor(node.args[0])))


# --- pointwise ops ---------------------------------------------------------------------------------------------


def _pointwise(build: Callable[..., Expression]) -> Rule:
    """An op of numbers: `build` makes an expression of those of its arguments."""
    return Rule(lambda lowering, node: lowering.pointwise(node, build), computes_arguments=True)


def _apply(function: str) -> Rule:
    assert function in FUNCTIONS, f"there is no function {function}"
    return _pointwise(lambda *arguments: Apply(function, arguments))


def _scaled(function: str) -> Callable[..., Expression]:
    """`function(a, alpha * b)`."""

    def build(a: Expression, b: Expression, alpha: Expression | None = None) -> Expression:
        return Apply(function, (a, b if alpha in (None, Constant(1.0)) else Apply("mul", (alpha, b))))

    return build


def _reversed_sub(a: Expression, b: Expression, alpha: Expression | None = None) -> Expression:
    return _scaled("sub")(b, a, alpha)


def _power(base: Expression, exponent: Expression) -> Expression:
    exact = {2.0: "square", 3.0: "cube", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal", 1.0: "copy"}
    if isinstance(exponent, Constant) and exponent.value in exact:
        return Apply(exact[exponent.value], (base,))
    return Apply("pow", (base, exponent))


def _remainder(value: Expression, divisor: Expression) -> Expression:
    """With the sign of the divisor."""
    rest = Apply("fmod", (value, divisor))
    return Apply("where", (_has_other_sign(rest, divisor), Apply("add", (rest, divisor)), rest))


def _has_other_sign(rest: Expression, divisor: Expression) -> Expression:
    """Whether there is a rest, of another sign than the divisor."""
    zero = Constant(0.0)
    differs = Apply("ne", (Apply("lt", (rest, zero)), Apply("lt", (divisor, zero))))
    return Apply("logical_and", (Apply("ne", (rest, zero)), differs))


def _quotient(value: Expression, divisor: Expression, rounding_mode: str | None = None) -> Expression:
    """As PyTorch rounds it down: by what is left, since the quotient may be rounded up to a whole number."""
    quotient = Apply("div", (value, divisor))
    if rounding_mode is None:
        return quotient
    if rounding_mode == "trunc":
        return Apply("trunc", (quotient,))
    rest = Apply("fmod", (value, divisor))
    exact = Apply("div", (Apply("sub", (value, rest)), divisor))
    exact = Apply("where", (_has_other_sign(rest, divisor), Apply("sub", (exact, Constant(1.0))), exact))
    below = Apply("floor", (exact,))
    half = Apply("gt", (Apply("sub", (exact, below)), Constant(0.5)))
    rounded = Apply("where", (half, Apply("add", (below, Constant(1.0))), below))
    # A zero has the sign of the quotient.
    rounded = Apply("where", (Apply("eq", (exact, Constant(0.0))), Apply("mul", (quotient, Constant(0.0))), rounded))
    return Apply("where", (Apply("eq", (divisor, Constant(0.0))), quotient, rounded))


def _but_not_nan(function: str) -> Callable[[Expression, Expression], Expression]:
    """Of two numbers, or of the one that is not NaN."""

    def build(a: Expression, b: Expression) -> Expression:
        chosen = Apply("where", (Apply("ne", (b, b)), a, Apply(function, (a, b))))
        return Apply("where", (Apply("ne", (a, a)), b, chosen))

    return build


def _clamped(value: Expression, min: Expression | None = None, max: Expression | None = None) -> Expression:
    if min is not None:
        value = Apply("maximum", (value, min))
    return value if max is None else Apply("minimum", (value, max))


# --- everything else -------------------------------------------------------------------------------------------


def _dims(argument: Any, value: Value) -> list[int]:
    """The argument `dim` of a reduction; none given means all."""
    if argument is None or argument == []:
        return list(range(len(value.shape)))
    return [argument] if isinstance(argument, int) else list(argument)


def _reduction(combine: str) -> Callable[[Lowering, fx.Node], Value]:
    def build(lowering: Lowering, node: fx.Node) -> Value:
        given = arguments_of(node)
        value = lowering.tensor(given["self"])
        return lowering.reduce(value, _dims(given.get("dim"), value), bool(given.get("keepdim")), combine)

    return build


def _sum(lowering: Lowering, node: fx.Node) -> Value:
    """Of truth values it is whether there is a true one."""
    if node.meta["val"].dtype != torch.bool:
        return _reduction("add")(lowering, node)
    given = arguments_of(node)
    value = lowering.tensor(given["self"])
    truth = Value(value.shape, as_truth(value.expression))
    return lowering.reduce(truth, _dims(given.get("dim"), value), bool(given.get("keepdim")), "maximum")


def _mean(lowering: Lowering, node: fx.Node) -> Value:
    value = lowering.tensor(arguments_of(node)["self"])
    total = _reduction("add")(lowering, node)
    return _over(total, math.prod(value.shape) / math.prod(total.shape))


def _over(value: Value, count: float) -> Value:
    if count == 0:
        raise Unprintable("no kernel is printed for the mean of nothing")
    return Value(value.shape, Apply("div", (value.expression, Constant(float(count)))))


def _variance(lowering: Lowering, node: fx.Node) -> tuple[Value, Value]:
    given = arguments_of(node)
    value = lowering.loaded(lowering.tensor(given["self"]))
    dims, keepdim = _dims(given["dim"], value), bool(given["keepdim"])
    correction = 1 if given["correction"] is None else given["correction"]
    total = lowering.reduce(value, dims, True, "add")
    count = math.prod(value.shape) / math.prod(total.shape)
    mean = lowering.materialised(_over(total, count))
    centred = Apply("sub", (value.expression, lowering.broadcast(mean, value.shape)))
    squares = lowering.reduce(Value(value.shape, Apply("square", (centred,))), dims, keepdim, "add")
    # At most as many degrees of freedom as PyTorch counts: none gives NaN or infinity there as here.
    variance = Apply("div", (squares.expression, Constant(max(count - correction, 0.0))))
    shaped = mean if keepdim else Value(squares.shape, Load(View(_buffer(mean), contiguous(squares.shape))))
    return Value(squares.shape, variance), shaped


def _buffer(value: Value) -> Buffer:
    assert isinstance(value.expression, Load)
    return value.expression.view.buffer


def _product(lowering: Lowering, node: fx.Node) -> Value:
    given = arguments_of(node)
    return lowering.contract(lowering.tensor(given["self"]), lowering.tensor(given["mat2"]))


def _added_product(lowering: Lowering, node: fx.Node) -> Value:
    """addmm, baddbmm: `beta * added + alpha * (left @ right)`."""
    given = arguments_of(node)
    added, left, right = map(lowering.tensor, list(given.values())[:3])
    product, alpha, beta = lowering.contract(left, right), given["alpha"], given["beta"]
    scaled = product.expression if alpha == 1 else Apply("mul", (Constant(float(alpha)), product.expression))
    if beta == 0:  # what is added then need not be finite
        return Value(product.shape, scaled)
    other = lowering.broadcast(added, product.shape)
    other = other if beta == 1 else Apply("mul", (Constant(float(beta)), other))
    return Value(product.shape, Apply("add", (scaled, other)))


def _full(value: float | str) -> Rule:
    """A tensor of one number, or of the argument of this name."""

    def build(_: Lowering, node: fx.Node) -> Value:
        number = arguments_of(node)[value] if isinstance(value, str) else value
        result = node.meta["val"]
        return Value(tuple(result.shape), Constant(as_number(number, result.dtype)))

    return Rule(build)


def _cat(lowering: Lowering, node: fx.Node) -> Value:
    given = arguments_of(node)
    tensors = [lowering.tensor(part) for part in given["tensors"]]
    shape, dim = tuple(node.meta["val"].shape), given["dim"] % node.meta["val"].dim()
    parts, start = [], 0
    for part in tensors:
        if len(part.shape) == len(shape):  # PyTorch lets an empty vector be joined with anything
            parts.append((dim, start, part))
            start += part.shape[dim]
    return _assembled(lowering, shape, None, parts)


def _assembled(
    lowering: Lowering, shape: tuple[int, ...], base: Value | None, parts: Sequence[tuple[int, int, Value]]
) -> Value:
    """A tensor put together: `base`, with each part written over it from `start` on along `dim`."""
    every = [*([base] if base else []), *(part for _, _, part in parts)]
    varying = any(view.buffer.varying for value in every for view in views(value.expression))
    buffer, strides = lowering.local(shape, varying), contiguous(shape)
    if base is not None:
        lowering.write(in_memory(buffer, shape), base)
    for dim, start, part in parts:
        place = View(buffer, strides, start * strides[dim])
        lowering.write(Value(part.shape, Load(place)), part)
    return in_memory(buffer, shape)


def _slice_scatter(lowering: Lowering, node: fx.Node) -> Value:
    given = arguments_of(node)
    base, source = lowering.tensor(given["self"]), lowering.tensor(given["src"])
    dim = given["dim"] % len(base.shape)
    start, _, _ = slice(given["start"], given["end"]).indices(base.shape[dim])
    strides = list(contiguous(base.shape))
    offset = start * strides[dim]
    strides[dim] *= given["step"]
    return _overwritten(lowering, base, (tuple(strides), offset), source)


def _overwritten(lowering: Lowering, base: Value, place: tuple[tuple[int, ...], int], source: Value) -> Value:
    """A copy of `base` with `source` in it, at a place with such strides and offset."""
    varying = any(view.buffer.varying for value in (base, source) for view in views(value.expression))
    buffer = lowering.local(base.shape, varying)
    lowering.write(in_memory(buffer, base.shape), base)
    lowering.write(Value(source.shape, Load(View(buffer, *place))), source)
    return in_memory(buffer, base.shape)


def _diagonal_scatter(lowering: Lowering, node: fx.Node) -> Value:
    given = arguments_of(node)
    base, source = lowering.tensor(given["self"]), lowering.tensor(given["src"])
    place = torch.empty(base.shape, device="meta").diagonal(given["offset"], given["dim1"], given["dim2"])
    return _overwritten(lowering, base, (tuple(place.stride()), int(place.storage_offset())), source)


def _select_scatter(lowering: Lowering, node: fx.Node) -> Value:
    given = arguments_of(node)
    base, source = lowering.tensor(given["self"]), lowering.tensor(given["src"])
    dim, index = given["dim"] % len(base.shape), given["index"]
    shape = (*base.shape[:dim], 1, *base.shape[dim + 1 :])
    spread = lowering.loaded(source) if not isinstance(source.expression, Constant) else source

    def change(view: View) -> View:
        return View(view.buffer, (*view.strides[:dim], 0, *view.strides[dim:]), view.offset)

    part = Value(shape, map_views(spread.expression, change))
    return _assembled(lowering, base.shape, base, [(dim, index % base.shape[dim], part)])


def _padded(lowering: Lowering, node: fx.Node) -> Value:
    given = arguments_of(node)
    pads = given["pad"]
    value = _cut(lowering.tensor(given["self"]), pads)
    shape = tuple(node.meta["val"].shape)
    buffer = lowering.local(shape, any(view.buffer.varying for view in views(value.expression)))
    border = Constant(as_number(given["value"], node.meta["val"].dtype))
    lowering.write(in_memory(buffer, shape), Value(shape, border))
    strides, rank = contiguous(shape), len(shape)
    offset = sum(strides[rank - 1 - index] * max(before, 0) for index, before in enumerate(pads[::2]))
    lowering.write(Value(value.shape, Load(View(buffer, strides, offset))), value)
    return in_memory(buffer, shape)


def _cut(value: Value, pads: Sequence[int]) -> Value:
    """What negative padding leaves of a tensor."""
    rank = len(value.shape)
    sizes, starts = list(value.shape), [0] * rank
    for index, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        dim = rank - 1 - index
        starts[dim] = max(-before, 0)
        sizes[dim] += min(before, 0) + min(after, 0)

    def change(view: View) -> View:
        moved = sum(start * stride for start, stride in zip(starts, view.strides, strict=True))
        return View(view.buffer, view.strides, view.offset + moved)

    return Value(tuple(sizes), map_views(value.expression, change))


def _flipped(lowering: Lowering, node: fx.Node) -> Value:
    given = arguments_of(node)
    value = lowering.loaded(lowering.tensor(given["self"]))
    dims = {dim % len(value.shape) for dim in given["dims"]}

    def change(view: View) -> View:
        offset = view.offset + sum(view.strides[dim] * (value.shape[dim] - 1) for dim in dims)
        strides = tuple(-stride if dim in dims else stride for dim, stride in enumerate(view.strides))
        return View(view.buffer, strides, offset)

    return Value(value.shape, map_views(value.expression, change))


def _identity_matrix(lowering: Lowering, node: fx.Node) -> Value:
    rows, columns = node.meta["val"].shape
    values = tuple(float(i == j) for i in range(rows) for j in range(columns))
    return lowering.constant(values, (rows, columns))


RULES: dict[str, Rule] = {
    **{
        name: Rule(_view, computes_arguments=True)
        for name in """alias.default detach.default view.default _unsafe_view.default t.default
        transpose.int permute.default unsqueeze.default squeeze.default squeeze.dim squeeze.dims select.int slice.Tensor
        diagonal.default split.Tensor split_with_sizes.default unbind.int unfold.default""".split()
    },
    "expand.default": Rule(_expanded),
    # Of numbers.
    "add.Tensor": _pointwise(_scaled("add")),
    "add.Scalar": _pointwise(_scaled("add")),
    "sub.Tensor": _pointwise(_scaled("sub")),
    "sub.Scalar": _pointwise(_scaled("sub")),
    "rsub.Tensor": _pointwise(_reversed_sub),
    "rsub.Scalar": _pointwise(_reversed_sub),
    "mul.Tensor": _apply("mul"),
    "mul.Scalar": _apply("mul"),
    "div.Tensor": _apply("div"),
    "div.Scalar": _apply("div"),
    "pow.Tensor_Scalar": _pointwise(_power),
    "pow.Tensor_Tensor": _pointwise(_power),
    "pow.Scalar": _pointwise(_power),
    "clamp.default": _pointwise(_clamped),
    "clamp.Tensor": _pointwise(_clamped),
    "clamp_min.default": _pointwise(_clamped),
    "clamp_max.default": _pointwise(lambda value, max: _clamped(value, None, max)),
    "where.self": _apply("where"),
    "copy.default": _pointwise(lambda _, value, *__: value),
    "remainder.Tensor": _pointwise(_remainder),
    "remainder.Scalar": _pointwise(_remainder),
    "div.Tensor_mode": _pointwise(_quotient),
    "div.Scalar_mode": _pointwise(_quotient),
    "fmin.default": _pointwise(_but_not_nan("minimum")),
    "fmax.default": _pointwise(_but_not_nan("maximum")),
    "isnan.default": _pointwise(lambda value: Apply("ne", (value, value))),
    **{f"{name}.default": _pointwise(lambda value: value) for name in ("clone", "lift_fresh_copy")},
    **{
        f"{name}.default": _apply(name)
        for name in """abs ceil cos erf erfc erfinv exp exp2 expm1 floor log log10 log1p log2 maximum minimum neg reciprocal relu
        round rsqrt sigmoid sign sin sqrt tan tanh atan asin acos sinh cosh trunc logical_and logical_or logical_not
        atan2 asinh acosh atanh""".split()
    },
    **{f"{name}.Tensor": _apply(name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "fmod")},
    **{f"{name}.Scalar": _apply(name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "fmod")},
    # Only truth values reach these: other integers have no kernel.
    "bitwise_and.Tensor": _apply("logical_and"),
    "bitwise_or.Tensor": _apply("logical_or"),
    "bitwise_not.default": _apply("logical_not"),
    # Along axes.
    "mm.default": Rule(_product),
    "bmm.default": Rule(_product),
    "addmm.default": Rule(_added_product),
    "baddbmm.default": Rule(_added_product),
    "sum.default": Rule(_sum, computes_arguments=True),
    "sum.dim_IntList": Rule(_sum, computes_arguments=True),
    "mean.default": Rule(_mean, computes_arguments=True),
    "mean.dim": Rule(_mean, computes_arguments=True),
    "amax.default": Rule(_reduction("maximum"), computes_arguments=True),
    "amin.default": Rule(_reduction("minimum"), computes_arguments=True),
    "var.correction": Rule(lambda lowering, node: _variance(lowering, node)[0]),
    "var_mean.correction": Rule(lambda lowering, node: list(map(lowering.loaded, _variance(lowering, node)))),
    # Put together.
    "cat.default": Rule(_cat, computes_arguments=True),
    "slice_scatter.default": Rule(_slice_scatter, computes_arguments=True),
    "select_scatter.default": Rule(_select_scatter, computes_arguments=True),
    "diagonal_scatter.default": Rule(_diagonal_scatter, computes_arguments=True),
    "constant_pad_nd.default": Rule(_padded, computes_arguments=True),
    "flip.default": Rule(_flipped),
    "_to_copy.default": _pointwise(lambda value: value),  # what another dtype makes of it, `WholeNumbers` knows
    # At places that tensors name.
    "index.Tensor": Rule(indexing.indexed),
    "_unsafe_index.Tensor": Rule(indexing.indexed),
    "gather.default": Rule(indexing.gathered),
    "scatter.src": Rule(indexing.scattered("src")),
    "scatter.value": Rule(indexing.scattered("value")),
    "scatter_add.default": Rule(indexing.scattered("src", adds=True)),
    "index_put.default": Rule(indexing.put),
    "_unsafe_index_put.default": Rule(indexing.put),
    # New.
    "eye.default": Rule(_identity_matrix),
    "eye.m": Rule(_identity_matrix),
    "full.default": _full("fill_value"),
    "full_like.default": _full("fill_value"),
    "new_full.default": _full("fill_value"),
    "scalar_tensor.default": _full("s"),
    "fill.Scalar": _full("value"),
    **{f"{name}.default": _full(0.0) for name in ("zeros", "zeros_like", "new_zeros")},
    **{f"{name}.default": _full(1.0) for name in ("ones", "ones_like", "new_ones")},
    # Of these only the shape is ever read.
    **{f"{name}.default": _full(0.0) for name in ("empty_like", "new_empty", "empty_permuted", "new_empty_strided")},
    "empty.memory_format": _full(0.0),
}
