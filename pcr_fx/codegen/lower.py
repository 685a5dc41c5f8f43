"""From the aten graph of one sample to the language of kernels."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pcr_fx.codegen.ir import (
    Apply,
    Buffer,
    Constant,
    Expression,
    Function,
    Load,
    Loop,
    View,
    contiguous,
    map_views,
    simplify,
    views,
)
from pcr_fx.errors import UnsupportedError

# Constants of a body that are written out in its kernel's source.
_MAX_CONSTANTS = 4096


class Unprintable(UnsupportedError):
    """A body that no kernel can be printed for; the message names the op, or says why."""


@dataclass(frozen=True)
class _Value:
    """A tensor of the graph: an expression over its own indices, not necessarily in memory."""

    shape: tuple[int, ...]
    expression: Expression


def lower(graph: fx.Graph, owner: torch.nn.Module, varying: Sequence[bool], sums: Sequence[bool]) -> Function:
    """The function that `graph` computes for one sample.

    Args:
        graph: aten ops only, none of which writes in place, with static shapes and a `meta["val"]` on every node.
        owner: holds the tensors that the graph names as attributes.
        varying: for each input, whether every sample has its own.
        sums: for each output, whether it is to be summed over the samples.

    Raises:
        Unprintable: an op or a dtype that has no form here.
    """
    return _Lowering(graph, owner, varying).function(sums)


class _Lowering:
    def __init__(self, graph: fx.Graph, owner: torch.nn.Module, varying: Sequence[bool]) -> None:
        self.graph, self.owner = graph, owner
        self.values: dict[fx.Node, _Value | list[_Value]] = {}
        self.loops: list[Loop] = []
        self.inputs: list[Buffer] = []
        self.count = 0
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        for index, (node, varies) in enumerate(zip(placeholders, varying, strict=True)):
            value = node.meta["val"]
            buffer = Buffer(f"in{index}", value.numel(), varies)
            self.inputs.append(buffer)
            self.values[node] = _in_memory(buffer, tuple(value.shape))
        self.dtype = placeholders[0].meta["val"].dtype

    def function(self, sums: Sequence[bool]) -> Function:
        for node in self.graph.nodes:
            if node.op in ("call_function", "get_attr"):
                self.values[node] = self._keep(node, self._visit(node))
        results: Any = self.graph.output_node().args[0]
        results = results if isinstance(results, (tuple, list)) else [results]
        outputs = []
        for index, (result, summed) in enumerate(zip(results, sums, strict=True)):
            value = self.tensor(result)
            out = Buffer(f"out{index}", math.prod(value.shape), not summed)
            self.write(_in_memory(out, value.shape), value)
            outputs.append(out)
        return Function(tuple(self.inputs), tuple(outputs), tuple(self.loops))

    # --- nodes ----------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self._attribute(node)
        if node.target is operator.getitem:
            parts, index = node.args
            return self.values[parts][index]  # type: ignore[index]
        name = op_name(node)
        self._check_dtype(node, name)
        if name in _POINTWISE:
            return self._pointwise(node, _POINTWISE[name])
        if name in _SPECIAL:
            return _SPECIAL[name](self, node)
        if name in _VIEWS:
            return self._view(node)
        raise Unprintable(f"no kernel is printed for aten.{name}")

    def _check_dtype(self, node: fx.Node, name: str) -> None:
        value = node.meta["val"]
        if isinstance(value, (tuple, list)):
            return
        if name.startswith("bitwise_") and value.dtype != torch.bool:
            raise Unprintable(f"no kernel is printed for aten.{name} of {value.dtype}")
        # Whole numbers come from truth values counted, as in the derivative of a maximum: exact in any real dtype.
        if value.dtype not in (self.dtype, torch.bool, torch.int64):
            raise Unprintable(f"no kernel is printed for aten.{name} of {value.dtype} beside {self.dtype}")

    def _keep(self, node: fx.Node, value: Any) -> Any:
        """The value as it is where it is used once, by an op that can compute it on the way; else put in memory."""
        if isinstance(value, list) or isinstance(value.expression, (Load, Constant)):
            return value
        users = list(node.users)
        if len(users) == 1 and _occurrences(users[0], node) == 1 and _computes_on_the_way(users[0]):
            return value
        return self.materialised(value)

    def tensor(self, argument: Any) -> _Value:
        if isinstance(argument, fx.Node):
            value = self.values[argument]
            assert isinstance(value, _Value)
            return value
        if isinstance(argument, (bool, int, float)):
            return _Value((), Constant(float(argument)))
        raise Unprintable(f"no kernel is printed for an argument {argument!r}")

    def broadcast(self, value: _Value, shape: tuple[int, ...]) -> Expression:
        """The value over the indices of a `shape` that it broadcasts to."""
        missing = len(shape) - len(value.shape)

        def spread(view: View) -> View:
            strides = (0 if size == 1 else stride for size, stride in zip(value.shape, view.strides, strict=True))
            return View(view.buffer, (*(0 for _ in range(missing)), *strides), view.offset)

        if value.shape != shape and math.prod(value.shape) != math.prod(shape):
            value = self.loaded(value)
        return map_views(value.expression, spread)

    def loaded(self, value: _Value) -> _Value:
        """In memory, unless it is free to compute again."""
        return value if isinstance(value.expression, (Load, Constant)) else self.materialised(value)

    def materialised(self, value: _Value) -> _Value:
        varying = any(view.buffer.varying for view in views(value.expression))
        kept = _in_memory(self.local(value.shape, varying), value.shape)
        self.write(kept, value)
        return kept

    def local(self, shape: Sequence[int], varying: bool) -> Buffer:
        self.count += 1
        return Buffer(f"t{self.count}", math.prod(shape), varying)

    def write(self, place: _Value, value: _Value) -> None:
        assert isinstance(place.expression, Load)
        if math.prod(value.shape):
            self.loops.append(simplify(Loop(place.expression.view, value.shape, value.expression)))

    def _attribute(self, node: fx.Node) -> _Value:
        tensor = getattr(self.owner, str(node.target))
        if tensor.numel() > _MAX_CONSTANTS or tensor.dtype not in (self.dtype, torch.bool):
            raise Unprintable(f"no kernel is printed for a constant of {tensor.numel()} numbers of {tensor.dtype}")
        if tensor.dim() == 0:
            return _Value((), Constant(float(tensor)))
        values = tuple(tensor.detach().to("cpu", torch.float64).reshape(-1).tolist())
        return self.constant(values, tuple(tensor.shape))

    def constant(self, values: tuple[float, ...], shape: tuple[int, ...]) -> _Value:
        self.count += 1
        return _in_memory(Buffer(f"c{self.count}", len(values), False, values), shape)

    # --- kinds of ops ---------------------------------------------------------------------------------------

    def _pointwise(self, node: fx.Node, build: Callable[..., Expression]) -> _Value:
        shape = tuple(node.meta["val"].shape)
        arguments = [self._operand(argument, shape) for argument in node.args]
        options = {name: self._operand(node.kwargs[name], shape) for name in _MEANINGFUL if name in node.kwargs}
        return _Value(shape, build(*arguments, **options))

    def _operand(self, argument: Any, shape: tuple[int, ...]) -> Any:
        """A tensor as an expression over `shape`, a number as a constant, anything else as it is."""
        if isinstance(argument, (fx.Node, int, float)):
            return self.broadcast(self.tensor(argument), shape)
        return argument

    def _view(self, node: fx.Node) -> _Value | list[_Value]:
        """A view op: PyTorch itself works out the strides, on a tensor without memory."""
        value, *rest = (self.tensor(node.args[0]), *node.args[1:])
        assert callable(node.target)
        if op_name(node) == "expand.default":
            value = self.loaded(value)
        try:
            return self._viewed(node.target, value, rest, node.kwargs)
        except (RuntimeError, ValueError):
            # Such as a reshape of a transpose, which is a copy.
            return self._viewed(node.target, self.materialised(value), rest, node.kwargs)

    def _viewed(self, op: Callable[..., Any], value: _Value, rest: Sequence[Any], kwargs: Any) -> Any:
        def stand_in(view: View) -> Tensor:
            base = torch.empty(view.buffer.size, device="meta")
            return base.as_strided(value.shape, view.strides, view.offset)

        shapes = op(torch.empty(value.shape, device="meta"), *rest, **kwargs)
        if isinstance(shapes, Tensor):

            def change(view: View) -> View:
                result = op(stand_in(view), *rest, **kwargs)
                return View(view.buffer, tuple(result.stride()), int(result.storage_offset()))

            return _Value(tuple(shapes.shape), map_views(value.expression, change))
        parts = []
        loaded = self.loaded(value)
        for index, shape in enumerate(shapes):

            def change_part(view: View, index: int = index) -> View:
                result = op(stand_in(view), *rest, **kwargs)[index]
                return View(view.buffer, tuple(result.stride()), int(result.storage_offset()))

            parts.append(_Value(tuple(shape.shape), map_views(loaded.expression, change_part)))
        return parts

    def reduce(self, value: _Value, dims: Sequence[int], keepdim: bool, combine: str) -> _Value:
        """The value combined over `dims`, in memory."""
        rank = len(value.shape)
        gone = sorted({dim % rank for dim in dims}) if rank else []
        if not gone:
            return value
        kept = [dim for dim in range(rank) if dim not in gone]
        shape = tuple(value.shape[dim] for dim in kept)
        order = [*kept, *gone]

        def change(view: View, count: int | None = None) -> View:
            return View(view.buffer, tuple(view.strides[dim] for dim in order[:count]), view.offset)

        final = tuple(1 if dim in gone else size for dim, size in enumerate(value.shape)) if keepdim else shape
        if all(value.shape[dim] == 1 for dim in gone):
            return (
                value if keepdim else _Value(shape, map_views(value.expression, lambda view: change(view, len(kept))))
            )
        varying = any(view.buffer.varying for view in views(value.expression))
        buffer = self.local(shape, varying)
        out = View(buffer, contiguous(shape))
        reduced = tuple(value.shape[dim] for dim in gone)
        self.loops.append(simplify(Loop(out, shape, map_views(value.expression, change), reduced, combine)))
        return _in_memory(buffer, final)

    def contract(self, left: _Value, right: _Value) -> _Value:
        """`[..., i, k] @ [..., k, j]`, with as many leading dimensions on either side."""
        left, right = self.loaded(left), self.loaded(right)
        *batch, rows, inner = left.shape
        columns = right.shape[-1]
        shape = (*batch, rows, columns)
        lead = len(batch)

        def of_left(view: View) -> View:
            return View(view.buffer, (*view.strides[:lead], view.strides[-2], 0, view.strides[-1]), view.offset)

        def of_right(view: View) -> View:
            return View(view.buffer, (*view.strides[:lead], 0, view.strides[-1], view.strides[-2]), view.offset)

        product = Apply("mul", (map_views(left.expression, of_left), map_views(right.expression, of_right)))
        return (
            self.reduce(_Value((*shape, inner), product), [lead + 2], False, "add")
            if inner != 1
            else _Value(shape, map_views(product, lambda view: View(view.buffer, view.strides[:-1], view.offset)))
        )


def op_name(node: fx.Node) -> str:
    """As in "add.Tensor"."""
    return str(node.target).removeprefix("aten.")


def _in_memory(buffer: Buffer, shape: tuple[int, ...]) -> _Value:
    return _Value(shape, Load(View(buffer, contiguous(shape))))


def _occurrences(user: fx.Node, node: fx.Node) -> int:
    """How often `user` names `node` among its arguments."""
    found: list[fx.Node] = []
    fx.map_arg((user.args, user.kwargs), found.append)
    return found.count(node)


def _computes_on_the_way(user: fx.Node) -> bool:
    """Whether an op reads each number of its arguments once, so that it may as well compute it."""
    if user.op == "output":
        return True
    name = op_name(user)
    return name in _POINTWISE or name in _READ_ONCE or (name in _VIEWS and name != "expand.default")


# --- views: PyTorch tells their strides ------------------------------------------------------------------------

_VIEWS = frozenset(
    """alias.default detach.default view.default _unsafe_view.default reshape.default t.default transpose.int
    permute.default expand.default unsqueeze.default squeeze.default squeeze.dim squeeze.dims select.int slice.Tensor
    diagonal.default split.Tensor split_with_sizes.default unbind.int unfold.default""".split()
)

# --- pointwise ops ---------------------------------------------------------------------------------------------

# Keyword arguments that change what is computed; others are about memory.
_MEANINGFUL = ("alpha", "min", "max")


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


_POINTWISE: dict[str, Callable[..., Expression]] = {
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


def _dims(argument: Any, value: _Value) -> list[int]:
    """The argument `dim` of a reduction; none given means all."""
    if argument is None or argument == []:
        return list(range(len(value.shape)))
    return [argument] if isinstance(argument, int) else list(argument)


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _reduction(combine: str) -> Callable[[_Lowering, fx.Node], _Value]:
    def build(lowering: _Lowering, node: fx.Node) -> _Value:
        value = lowering.tensor(node.args[0])
        dims = _dims(_argument(node, 1, "dim"), value)
        return lowering.reduce(value, dims, bool(_argument(node, 2, "keepdim", False)), combine)

    return build


def _mean(lowering: _Lowering, node: fx.Node) -> _Value:
    value = lowering.tensor(node.args[0])
    total = _reduction("add")(lowering, node)
    return _over(total, math.prod(value.shape) / math.prod(total.shape))


def _over(value: _Value, count: float) -> _Value:
    if count == 0:
        raise Unprintable("no kernel is printed for the mean of nothing")
    return _Value(value.shape, Apply("div", (value.expression, Constant(float(count)))))


def _variance(lowering: _Lowering, node: fx.Node) -> tuple[_Value, _Value]:
    value = lowering.loaded(lowering.tensor(node.args[0]))
    dims = _dims(_argument(node, 1, "dim"), value)
    correction = _argument(node, 2, "correction", 1)
    keepdim = bool(_argument(node, 3, "keepdim", False))
    total = lowering.reduce(value, dims, True, "add")
    count = math.prod(value.shape) / math.prod(total.shape)
    mean = lowering.materialised(_over(total, count))
    centred = Apply("sub", (value.expression, lowering.broadcast(mean, value.shape)))
    squares = lowering.reduce(_Value(value.shape, Apply("square", (centred,))), dims, keepdim, "add")
    # At most as many degrees of freedom as PyTorch counts: none gives NaN or infinity there as here.
    variance = Apply("div", (squares.expression, Constant(max(count - (1 if correction is None else correction), 0.0))))
    shaped = mean if keepdim else _Value(squares.shape, Load(View(_buffer(mean), contiguous(squares.shape))))
    return _Value(squares.shape, variance), shaped


def _buffer(value: _Value) -> Buffer:
    assert isinstance(value.expression, Load)
    return value.expression.view.buffer


def _product(lowering: _Lowering, node: fx.Node) -> _Value:
    return lowering.contract(lowering.tensor(node.args[0]), lowering.tensor(node.args[1]))


def _added_product(lowering: _Lowering, node: fx.Node) -> _Value:
    """addmm, baddbmm: `beta * added + alpha * (left @ right)`."""
    added, left, right = map(lowering.tensor, node.args[:3])
    product = lowering.contract(left, right)
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    scaled = product.expression if alpha == 1 else Apply("mul", (Constant(float(alpha)), product.expression))
    if beta == 0:  # what is added then need not be finite
        return _Value(product.shape, scaled)
    other = lowering.broadcast(added, product.shape)
    other = other if beta == 1 else Apply("mul", (Constant(float(beta)), other))
    return _Value(product.shape, Apply("add", (scaled, other)))


def _full(value: Callable[[fx.Node], float]) -> Callable[[_Lowering, fx.Node], _Value]:
    return lambda _, node: _Value(tuple(node.meta["val"].shape), Constant(float(value(node))))


def _cat(lowering: _Lowering, node: fx.Node) -> _Value:
    tensors = [lowering.tensor(part) for part in node.args[0]]  # type: ignore[union-attr]
    shape, dim = tuple(node.meta["val"].shape), _argument(node, 1, "dim", 0) % node.meta["val"].dim()
    parts, start = [], 0
    for part in tensors:
        if len(part.shape) == len(shape):  # PyTorch lets an empty vector be joined with anything
            parts.append((dim, start, part))
            start += part.shape[dim]
    return _assembled(lowering, shape, None, parts)


def _assembled(
    lowering: _Lowering, shape: tuple[int, ...], base: _Value | None, parts: Sequence[tuple[int, int, _Value]]
) -> _Value:
    """A tensor put together: `base`, with each part written over it from `start` on along `dim`."""
    every = [*([base] if base else []), *(part for _, _, part in parts)]
    varying = any(view.buffer.varying for value in every for view in views(value.expression))
    buffer, strides = lowering.local(shape, varying), contiguous(shape)
    if base is not None:
        lowering.write(_in_memory(buffer, shape), base)
    for dim, start, part in parts:
        place = View(buffer, strides, start * strides[dim])
        lowering.write(_Value(part.shape, Load(place)), part)
    return _in_memory(buffer, shape)


def _slice_scatter(lowering: _Lowering, node: fx.Node) -> _Value:
    base, source = map(lowering.tensor, node.args[:2])
    dim = _argument(node, 2, "dim", 0) % len(base.shape)
    size = base.shape[dim]
    start, _, _ = slice(_argument(node, 3, "start"), _argument(node, 4, "end"), None).indices(size)
    if _argument(node, 5, "step", 1) != 1:
        raise Unprintable("no kernel is printed for aten.slice_scatter with a step")
    return _assembled(lowering, base.shape, base, [(dim, start, source)])


def _select_scatter(lowering: _Lowering, node: fx.Node) -> _Value:
    base, source = map(lowering.tensor, node.args[:2])
    dim, index = int(node.args[2]) % len(base.shape), int(node.args[3])  # type: ignore[arg-type]
    shape = (*base.shape[:dim], 1, *base.shape[dim + 1 :])
    spread = lowering.loaded(source) if not isinstance(source.expression, Constant) else source

    def change(view: View) -> View:
        return View(view.buffer, (*view.strides[:dim], 0, *view.strides[dim:]), view.offset)

    part = _Value(shape, map_views(spread.expression, change))
    return _assembled(lowering, base.shape, base, [(dim, index % base.shape[dim], part)])


def _padded(lowering: _Lowering, node: fx.Node) -> _Value:
    value, pads = lowering.tensor(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    value = _cut(value, pads)
    shape = tuple(node.meta["val"].shape)
    buffer = lowering.local(shape, any(view.buffer.varying for view in views(value.expression)))
    lowering.write(_in_memory(buffer, shape), _Value(shape, Constant(float(_argument(node, 2, "value", 0.0)))))
    strides, rank = contiguous(shape), len(shape)
    offset = sum(strides[rank - 1 - index] * max(before, 0) for index, before in enumerate(pads[::2]))
    lowering.write(_Value(value.shape, Load(View(buffer, strides, offset))), value)
    return _in_memory(buffer, shape)


def _cut(value: _Value, pads: Sequence[int]) -> _Value:
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

    return _Value(tuple(sizes), map_views(value.expression, change))


def _flipped(lowering: _Lowering, node: fx.Node) -> _Value:
    value = lowering.loaded(lowering.tensor(node.args[0]))
    dims = {dim % len(value.shape) for dim in node.args[1]}  # type: ignore[union-attr]

    def change(view: View) -> View:
        offset = view.offset + sum(view.strides[dim] * (value.shape[dim] - 1) for dim in dims)
        strides = tuple(-stride if dim in dims else stride for dim, stride in enumerate(view.strides))
        return View(view.buffer, strides, offset)

    return _Value(value.shape, map_views(value.expression, change))


def _to_copy(lowering: _Lowering, node: fx.Node) -> _Value:
    value = lowering.tensor(node.args[0])
    source, target = node.args[0].meta["val"].dtype, node.meta["val"].dtype  # type: ignore[union-attr]
    if target == torch.int64 and source.is_floating_point:
        raise Unprintable("no kernel is printed for a conversion to torch.int64")
    if target == torch.bool and source != torch.bool:
        return _Value(value.shape, Apply("ne", (value.expression, Constant(0.0))))
    return value


def _identity_matrix(lowering: _Lowering, node: fx.Node) -> _Value:
    rows, columns = node.meta["val"].shape
    values = tuple(float(i == j) for i in range(rows) for j in range(columns))
    return lowering.constant(values, (rows, columns))


_SPECIAL: dict[str, Callable[[_Lowering, fx.Node], Any]] = {
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
    "full.default": _full(lambda node: node.args[1]),
    "full_like.default": _full(lambda node: node.args[1]),
    "new_full.default": _full(lambda node: node.args[2]),
    "scalar_tensor.default": _full(lambda node: node.args[0]),
    **{f"{name}.default": _full(lambda node: 0.0) for name in ("zeros", "zeros_like", "new_zeros")},
    # Only their shapes are ever read.
    **{f"{name}.default": _full(lambda node: 0.0) for name in ("empty_like", "new_empty", "empty_permuted")},
    "empty.memory_format": _full(lambda node: 0.0),
    "fill.Scalar": _full(lambda node: node.args[1]),
    **{f"{name}.default": _full(lambda node: 1.0) for name in ("ones", "ones_like", "new_ones")},
}

# Beside the pointwise ops: each number of the argument is read once.
_READ_ONCE = frozenset(
    """sum.default sum.dim_IntList mean.default mean.dim amax.default amin.default cat.default slice_scatter.default
    select_scatter.default constant_pad_nd.default _to_copy.default""".split()
)
