"""What each aten op is in the language of kernels. An op that is in none of these tables has no kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

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

if TYPE_CHECKING:
    from pcr_fx.codegen.lower import Lowering


def op_name(node: fx.Node) -> str:
    """As in "add.Tensor"."""
    return str(node.target).removeprefix("aten.")


# --- views: PyTorch tells their strides ------------------------------------------------------------------------

VIEWS = frozenset(
    """alias.default detach.default view.default _unsafe_view.default reshape.default t.default transpose.int
    permute.default expand.default unsqueeze.default squeeze.default squeeze.dim squeeze.dims select.int slice.Tensor
    diagonal.default split.Tensor split_with_sizes.default unbind.int unfold.default""".split()
)

# --- pointwise ops ---------------------------------------------------------------------------------------------

# Keyword arguments that change what is computed; others are about memory.
MEANINGFUL = ("alpha", "min", "max")


def _apply(function: str) -> Callable[..., Expression]:
    return lambda *arguments: Apply(function, arguments)


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


def _clamped(value: Expression, min: Expression | None = None, max: Expression | None = None) -> Expression:
    if min is not None:
        value = Apply("maximum", (value, min))
    return value if max is None else Apply("minimum", (value, max))


def _same(value: Expression) -> Expression:
    return value


POINTWISE: dict[str, Callable[..., Expression]] = {
    "add.Tensor": _scaled("add"),
    "add.Scalar": _scaled("add"),
    "sub.Tensor": _scaled("sub"),
    "sub.Scalar": _scaled("sub"),
    "rsub.Tensor": _reversed_sub,
    "rsub.Scalar": _reversed_sub,
    "mul.Tensor": _apply("mul"),
    "mul.Scalar": _apply("mul"),
    "div.Tensor": _apply("div"),
    "div.Scalar": _apply("div"),
    "pow.Tensor_Scalar": _power,
    "pow.Tensor_Tensor": _power,
    "pow.Scalar": _power,
    "clamp.default": _clamped,
    "clamp.Tensor": _clamped,
    "clamp_min.default": _clamped,
    "clamp_max.default": lambda value, max: _clamped(value, None, max),
    "where.self": _apply("where"),
    "where.ScalarSelf": _apply("where"),
    "where.ScalarOther": _apply("where"),
    "where.Scalar": _apply("where"),
    "clone.default": _same,
    "contiguous.default": _same,
    "lift_fresh_copy.default": _same,
    **{
        f"{name}.default": _apply(name)
        for name in """abs ceil cos erf erfc exp expm1 floor log log10 log1p log2 maximum minimum neg reciprocal relu round
        rsqrt sigmoid sign sin sqrt tan tanh atan asin acos sinh cosh trunc logical_and logical_or logical_not atan2
        fmod""".split()
    },
    **{f"{name}.Tensor": _apply(name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "atan2", "fmod")},
    **{f"{name}.Scalar": _apply(name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "fmod")},
    # Only truth values reach these: other integers have no kernel.
    "bitwise_and.Tensor": _apply("logical_and"),
    "bitwise_or.Tensor": _apply("logical_or"),
    "bitwise_not.default": _apply("logical_not"),
}

# --- everything else -------------------------------------------------------------------------------------------


def _dims(argument: Any, value: Value) -> list[int]:
    """The argument `dim` of a reduction; none given means all."""
    if argument is None or argument == []:
        return list(range(len(value.shape)))
    return [argument] if isinstance(argument, int) else list(argument)


def _argument(node: fx.Node, position: int, name: str = "", default: Any = None) -> Any:
    """An argument by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _reduction(combine: str) -> Callable[[Lowering, fx.Node], Value]:
    def build(lowering: Lowering, node: fx.Node) -> Value:
        value = lowering.tensor(_argument(node, 0))
        dims = _dims(_argument(node, 1, "dim"), value)
        return lowering.reduce(value, dims, bool(_argument(node, 2, "keepdim", False)), combine)

    return build


def _mean(lowering: Lowering, node: fx.Node) -> Value:
    value = lowering.tensor(_argument(node, 0))
    total = _reduction("add")(lowering, node)
    return _over(total, math.prod(value.shape) / math.prod(total.shape))


def _over(value: Value, count: float) -> Value:
    if count == 0:
        raise Unprintable("no kernel is printed for the mean of nothing")
    return Value(value.shape, Apply("div", (value.expression, Constant(float(count)))))


def _variance(lowering: Lowering, node: fx.Node) -> tuple[Value, Value]:
    value = lowering.loaded(lowering.tensor(_argument(node, 0)))
    dims = _dims(_argument(node, 1, "dim"), value)
    correction = _argument(node, 2, "correction", 1)
    keepdim = bool(_argument(node, 3, "keepdim", False))
    total = lowering.reduce(value, dims, True, "add")
    count = math.prod(value.shape) / math.prod(total.shape)
    mean = lowering.materialised(_over(total, count))
    centred = Apply("sub", (value.expression, lowering.broadcast(mean, value.shape)))
    squares = lowering.reduce(Value(value.shape, Apply("square", (centred,))), dims, keepdim, "add")
    # At most as many degrees of freedom as PyTorch counts: none gives NaN or infinity there as here.
    variance = Apply("div", (squares.expression, Constant(max(count - (1 if correction is None else correction), 0.0))))
    shaped = mean if keepdim else Value(squares.shape, Load(View(_buffer(mean), contiguous(squares.shape))))
    return Value(squares.shape, variance), shaped


def _buffer(value: Value) -> Buffer:
    assert isinstance(value.expression, Load)
    return value.expression.view.buffer


def _product(lowering: Lowering, node: fx.Node) -> Value:
    return lowering.contract(lowering.tensor(_argument(node, 0)), lowering.tensor(_argument(node, 1)))


def _added_product(lowering: Lowering, node: fx.Node) -> Value:
    """addmm, baddbmm: `beta * added + alpha * (left @ right)`."""
    added, left, right = map(lowering.tensor, node.args[:3])
    product = lowering.contract(left, right)
    alpha, beta = _argument(node, 4, "alpha", 1), _argument(node, 3, "beta", 1)
    scaled = product.expression if alpha == 1 else Apply("mul", (Constant(float(alpha)), product.expression))
    if beta == 0:  # what is added then need not be finite
        return Value(product.shape, scaled)
    other = lowering.broadcast(added, product.shape)
    other = other if beta == 1 else Apply("mul", (Constant(float(beta)), other))
    return Value(product.shape, Apply("add", (scaled, other)))


def _full(value: Callable[[fx.Node], float]) -> Callable[[Lowering, fx.Node], Value]:
    return lambda _, node: Value(tuple(node.meta["val"].shape), Constant(float(value(node))))


def _cat(lowering: Lowering, node: fx.Node) -> Value:
    tensors = [lowering.tensor(part) for part in _argument(node, 0)]
    shape, dim = tuple(node.meta["val"].shape), _argument(node, 1, "dim", 0) % node.meta["val"].dim()
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
    base, source = map(lowering.tensor, node.args[:2])
    dim = _argument(node, 2, "dim", 0) % len(base.shape)
    size = base.shape[dim]
    start, _, _ = slice(_argument(node, 3, "start"), _argument(node, 4, "end"), None).indices(size)
    if _argument(node, 5, "step", 1) != 1:
        raise Unprintable("no kernel is printed for aten.slice_scatter with a step")
    return _assembled(lowering, base.shape, base, [(dim, start, source)])


def _select_scatter(lowering: Lowering, node: fx.Node) -> Value:
    base, source = map(lowering.tensor, node.args[:2])
    dim, index = int(_argument(node, 2)) % len(base.shape), int(_argument(node, 3))
    shape = (*base.shape[:dim], 1, *base.shape[dim + 1 :])
    spread = lowering.loaded(source) if not isinstance(source.expression, Constant) else source

    def change(view: View) -> View:
        return View(view.buffer, (*view.strides[:dim], 0, *view.strides[dim:]), view.offset)

    part = Value(shape, map_views(spread.expression, change))
    return _assembled(lowering, base.shape, base, [(dim, index % base.shape[dim], part)])


def _padded(lowering: Lowering, node: fx.Node) -> Value:
    value, pads = lowering.tensor(_argument(node, 0)), list(_argument(node, 1))
    value = _cut(value, pads)
    shape = tuple(node.meta["val"].shape)
    buffer = lowering.local(shape, any(view.buffer.varying for view in views(value.expression)))
    lowering.write(in_memory(buffer, shape), Value(shape, Constant(float(_argument(node, 2, "value", 0.0)))))
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
    value = lowering.loaded(lowering.tensor(_argument(node, 0)))
    dims = {dim % len(value.shape) for dim in _argument(node, 1)}

    def change(view: View) -> View:
        offset = view.offset + sum(view.strides[dim] * (value.shape[dim] - 1) for dim in dims)
        strides = tuple(-stride if dim in dims else stride for dim, stride in enumerate(view.strides))
        return View(view.buffer, strides, offset)

    return Value(value.shape, map_views(value.expression, change))


def _to_copy(lowering: Lowering, node: fx.Node) -> Value:
    value = lowering.tensor(_argument(node, 0))
    source, target = _argument(node, 0).meta["val"].dtype, node.meta["val"].dtype
    if target == torch.int64 and source.is_floating_point:
        raise Unprintable("no kernel is printed for a conversion to torch.int64")
    if target == torch.bool and source != torch.bool:
        return Value(value.shape, Apply("ne", (value.expression, Constant(0.0))))
    return value


def _identity_matrix(lowering: Lowering, node: fx.Node) -> Value:
    rows, columns = node.meta["val"].shape
    values = tuple(float(i == j) for i in range(rows) for j in range(columns))
    return lowering.constant(values, (rows, columns))


SPECIAL: dict[str, Callable[[Lowering, fx.Node], Any]] = {
    "mm.default": _product,
    "bmm.default": _product,
    "addmm.default": _added_product,
    "baddbmm.default": _added_product,
    "sum.default": _reduction("add"),
    "sum.dim_IntList": _reduction("add"),
    "mean.default": _mean,
    "mean.dim": _mean,
    "amax.default": _reduction("maximum"),
    "amin.default": _reduction("minimum"),
    "var.correction": lambda lowering, node: _variance(lowering, node)[0],
    "var_mean.correction": lambda lowering, node: list(map(lowering.loaded, _variance(lowering, node))),
    "cat.default": _cat,
    "slice_scatter.default": _slice_scatter,
    "select_scatter.default": _select_scatter,
    "constant_pad_nd.default": _padded,
    "flip.default": _flipped,
    "_to_copy.default": _to_copy,
    "eye.default": _identity_matrix,
    "eye.m": _identity_matrix,
    "full.default": _full(lambda node: _argument(node, 1)),
    "full_like.default": _full(lambda node: _argument(node, 1)),
    "new_full.default": _full(lambda node: _argument(node, 2)),
    "scalar_tensor.default": _full(lambda node: _argument(node, 0)),
    **{f"{name}.default": _full(lambda node: 0.0) for name in ("zeros", "zeros_like", "new_zeros")},
    # Only their shapes are ever read.
    **{f"{name}.default": _full(lambda node: 0.0) for name in ("empty_like", "new_empty", "empty_permuted")},
    "empty.memory_format": _full(lambda node: 0.0),
    "fill.Scalar": _full(lambda node: _argument(node, 1)),
    **{f"{name}.default": _full(lambda node: 1.0) for name in ("ones", "ones_like", "new_ones")},
}

# Beside the pointwise ops: each number of the argument is read once.
READ_ONCE = frozenset(
    """sum.default sum.dim_IntList mean.default mean.dim amax.default amin.default cat.default slice_scatter.default
    select_scatter.default constant_pad_nd.default _to_copy.default""".split()
)
