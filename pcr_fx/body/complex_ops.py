"""Ops of complex tensors by their real and imaginary parts: products, transforms, choices, and the table of all."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pcr_fx.body.complex_numbers import (
    Number,
    Pair,
    absolute,
    add,
    angle,
    as_pair,
    conj,
    cos,
    cosh,
    div,
    exp,
    log,
    mul,
    neg,
    over_i,
    parted,
    polar,
    power,
    reciprocal,
    scaled,
    sgn,
    sigmoid,
    sigmoid_backward,
    sin,
    sinh,
    sqrt,
    sub,
    tanh,
    tanh_backward,
    times_i,
)

aten = torch.ops.aten

# Numbers along a dimension that is Fourier transformed by a matrix, or multiplied one after another.
_MAX_TRANSFORMED, _MAX_IN_TURN = 64, 64


# --- products of matrices -----------------------------------------------------------------------------------------------


def bilinear(product: Callable[[Any, Any], Tensor]) -> Callable[..., Any]:
    def of(a: Number, b: Number) -> Any:
        if isinstance(a, Pair) and isinstance(b, Pair):
            real = product(a.real, b.real) - product(a.imag, b.imag)
            return Pair(real, product(a.real, b.imag) + product(a.imag, b.real))
        if isinstance(a, Pair):
            return Pair(product(a.real, b), product(a.imag, b))
        assert isinstance(b, Pair)
        return Pair(product(a, b.real), product(a, b.imag))

    return of


def _added(product: Callable[..., Any]) -> Callable[..., Any]:
    """addmm and the like."""

    def of(added: Number, a: Number, b: Number, *, beta: Any = 1, alpha: Any = 1) -> Any:
        result = scaled(bilinear(product)(a, b), parted(alpha))
        return result if beta == 0 else add(scaled(added, parted(beta)), result)

    return of


def _addcmul(a: Number, b: Number, c: Number, *, value: Any = 1) -> Any:
    return add(a, scaled(mul(b, c), parted(value)))


def _addcdiv(a: Number, b: Number, c: Number, *, value: Any = 1) -> Any:
    return add(a, scaled(div(b, c), parted(value)))


# --- along a dimension --------------------------------------------------------------------------------------------------


def _product(a: Pair, dim: int | None = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if dim is None:
        a, dim = Pair(a.real.reshape(-1), a.imag.reshape(-1)), 0
    if not 0 < a.real.shape[dim] <= _MAX_IN_TURN:
        return NotImplemented
    parts = [Pair(*both) for both in zip(a.real.unbind(dim), a.imag.unbind(dim), strict=True)]
    result = functools.reduce(mul, parts)
    return Pair(result.real.unsqueeze(dim), result.imag.unsqueeze(dim)) if keepdim else result


def _running_product(a: Pair, dim: int, *, dtype: Any = None) -> Any:
    if not 0 < a.real.shape[dim] <= _MAX_IN_TURN:
        return NotImplemented
    first, *others = (Pair(*both) for both in zip(a.real.unbind(dim), a.imag.unbind(dim), strict=True))
    results = [first]
    for other in others:
        results.append(mul(results[-1], other))
    return Pair(*(torch.stack([getattr(one, part) for one in results], dim) for part in ("real", "imag")))


def _norm(a: Pair, *rest: Any, **options: Any) -> Any:
    return aten.linalg_vector_norm.default(absolute(a), *rest, **{**options, "dtype": None})


# --- Fourier transforms -------------------------------------------------------------------------------------------------


def _waves(rows: int, columns: int, size: int, like: Any) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi j k / size, `[rows, columns]`."""
    j, k = (torch.arange(count, dtype=torch.int64, device=like.device) for count in (rows, columns))
    turns = torch.remainder(j[:, None] * k, size).to(torch.float64) * (2 * math.pi / size)
    return torch.cos(turns).to(like.dtype), torch.sin(turns).to(like.dtype)


def _norm_factor(sizes: Sequence[int], normalization: int) -> float:
    return (1.0, math.prod(sizes) ** -0.5, 1 / math.prod(sizes))[normalization]


def _along(dim: int, x: Tensor, matrix: Tensor) -> Tensor:
    return (x.movedim(dim, -1) @ matrix).movedim(-1, dim)


def _transformed(a: Number, dim: int, forward: bool) -> Any:
    size = (a.real if isinstance(a, Pair) else a).shape[dim]  # type: ignore[union-attr]
    cosine, sine = _waves(size, size, size, a.real if isinstance(a, Pair) else a)
    waves = Pair(cosine, -sine if forward else sine)
    return bilinear(functools.partial(_along, dim))(a, waves)


def _are_few(sizes: Sequence[int]) -> bool:
    return all(0 < size <= _MAX_TRANSFORMED for size in sizes)


def _fft(a: Number, dims: Sequence[int], normalization: int, forward: bool) -> Any:
    sizes = [as_real_part(a).shape[dim] for dim in dims]
    if not _are_few(sizes):
        return NotImplemented
    for dim in dims:
        a = _transformed(a, dim, forward)
    return scaled(a, _norm_factor(sizes, normalization))


def as_real_part(a: Any) -> Tensor:
    return a.real if isinstance(a, Pair) else a


def _real_fft(a: Tensor, dims: Sequence[int], normalization: int, onesided: bool) -> Any:
    sizes = [a.shape[dim] for dim in dims]
    if not _are_few(sizes):
        return NotImplemented
    *others, last = dims
    size = a.shape[last]
    cosine, sine = _waves(size, size // 2 + 1 if onesided else size, size, a)
    result: Any = Pair(_along(last, a, cosine), -_along(last, a, sine))
    return scaled(_fft(result, others, 0, True), _norm_factor(sizes, normalization))


def _inverse_real_fft(a: Pair, dims: Sequence[int], normalization: int, last_size: int) -> Any:
    *others, last = dims
    sizes = [*(a.real.shape[dim] for dim in others), last_size]
    if not _are_few(sizes):
        return NotImplemented
    a = _fft(a, others, 0, False)
    count = last_size // 2 + 1
    cosine, sine = _waves(count, last_size, last_size, a.real)
    # All but the mean, and the fastest of an even number, stand for two.
    twice = [1.0 if k == 0 or 2 * k == last_size else 2.0 for k in range(count)]
    weights = torch.stack([torch.full_like(cosine[0], weight) for weight in twice])
    real, imag = a.real.narrow(last, 0, count), a.imag.narrow(last, 0, count)
    result = _along(last, real, weights * cosine) - _along(last, imag, weights * sine)
    return scaled(result, _norm_factor(sizes, normalization))


# --- choices and comparisons --------------------------------------------------------------------------------------------


def _where(condition: Tensor, a: Number, b: Number) -> Pair:
    a, b = as_pair(a), as_pair(b)
    return Pair(torch.where(condition, a.real, b.real), torch.where(condition, a.imag, b.imag))


def _masked_fill(a: Pair, mask: Tensor, value: Number) -> Pair:
    return _where(mask, value, a)


def _eq(a: Number, b: Number) -> Tensor:
    a, b = as_pair(a), as_pair(b)
    return (a.real == b.real) & (a.imag == b.imag)


def _of_both(test: Callable[[Tensor], Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Pair], Tensor]:
    return lambda a: combine(test(a.real), test(a.imag))


# By name, for all overloads.
RULES: dict[str, Callable[..., Any]] = {
    "add": add,
    "sub": sub,
    "rsub": lambda a, b, alpha=1: sub(b, a, alpha=alpha),
    "neg": neg,
    "_neg_view": neg,
    "mul": mul,
    "div": div,
    "reciprocal": reciprocal,
    "square": lambda a: mul(a, a),
    "pow": power,
    "_conj": conj,
    "_conj_physical": conj,
    "conj_physical": conj,
    "resolve_conj": lambda a: a,
    "resolve_neg": lambda a: a,
    "view_as_real": lambda a: torch.stack([a.real, a.imag], -1),
    "view_as_complex": lambda a: Pair(a.select(-1, 0), a.select(-1, 1)),
    "real": as_real_part,
    "imag": lambda a: a.imag,
    "complex": Pair,
    "polar": polar,
    "abs": absolute,
    "angle": angle,
    "sgn": sgn,
    "exp": exp,
    "log": log,
    "sqrt": sqrt,
    "rsqrt": lambda a: reciprocal(sqrt(a)),
    "sin": sin,
    "cos": cos,
    "tan": lambda a: over_i(tanh(times_i(a))),
    "sinh": sinh,
    "cosh": cosh,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "tanh_backward": tanh_backward,
    "sigmoid_backward": sigmoid_backward,
    "mm": bilinear(torch.mm),
    "bmm": bilinear(torch.bmm),
    "mv": bilinear(torch.mv),
    "dot": bilinear(lambda a, b: (a * b).sum()),
    "vdot": lambda a, b: bilinear(lambda x, y: (x * y).sum())(conj(a), b),
    "addmm": _added(torch.mm),
    "baddbmm": _added(torch.bmm),
    "addmv": _added(torch.mv),
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "prod": _product,
    "cumprod": _running_product,
    "linalg_vector_norm": _norm,
    "_fft_c2c": _fft,
    "_fft_r2c": _real_fft,
    "_fft_c2r": _inverse_real_fft,
    "where": _where,
    "masked_fill": _masked_fill,
    "eq": _eq,
    "ne": lambda a, b: ~_eq(a, b),
    "isnan": _of_both(torch.isnan, torch.logical_or),
    "isinf": _of_both(torch.isinf, torch.logical_or),
    "isfinite": _of_both(torch.isfinite, torch.logical_and),
}

# Ops that do the same to both parts.
OF_EACH_PART = frozenset(
    """alias detach view _unsafe_view reshape _reshape_alias t transpose permute unsqueeze squeeze select slice expand unbind
    split split_with_sizes unsafe_split unsafe_split_with_sizes chunk clone contiguous copy index gather index_select
    index_put scatter scatter_add index_add roll flip diagonal diag_embed repeat unfold unfold_backward select_backward
    slice_backward diagonal_backward index_select_backward cat stack sum mean cumsum tril triu trace constant_pad_nd
    select_scatter slice_scatter diagonal_scatter lift_fresh lift_fresh_copy movedim embedding masked_scatter""".split()
)
# Ops that make a tensor of one number, by what that is; nothing for what they are told.
FILLED: dict[str, Any] = {
    **dict.fromkeys(
        "zeros zeros_like new_zeros empty empty_like new_empty new_empty_strided empty_strided".split(), 0.0
    ),
    **dict.fromkeys("ones ones_like new_ones".split(), 1.0),
    **dict.fromkeys("full full_like new_full scalar_tensor fill".split()),
}


# Of these, the argument that says where, the same for both parts: numbers of places, or a mask. All other tensors are values.
_WHERE = {
    **dict.fromkeys("index index_put embedding masked_scatter".split(), 1),
    **dict.fromkeys("gather index_select scatter scatter_add index_add".split(), 2),
    "index_select_backward": 3,
}
# And the argument that is a value though it may be a number.
_VALUE = {"constant_pad_nd": 2, "scatter": 3}


def of_each_part(name: str, target: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The op `name` on the real parts, then on the imaginary parts."""
    if "reduce" in kwargs:
        return NotImplemented
    kwargs = {key: value for key, value in kwargs.items() if key != "dtype"}
    if isinstance(kwargs.get("alpha"), Pair):  # of `index_add`, whose source is its last argument
        args = (*args[:-1], mul(args[-1], kwargs.pop("alpha")))

    def part(leaf: Any, which: str) -> Any:
        if isinstance(leaf, (list, tuple)):
            return type(leaf)(part(one, which) for one in leaf)
        if isinstance(leaf, Pair):
            return getattr(leaf, which)
        return torch.zeros_like(leaf) if isinstance(leaf, Tensor) and which == "imag" else leaf

    def parts(which: str) -> list[Any]:
        found = [one if place == _WHERE.get(name) else part(one, which) for place, one in enumerate(args)]
        at = _VALUE.get(name, len(found))
        if which == "imag" and at < len(found) and isinstance(args[at], (int, float)):
            found[at] = 0.0
        return found

    real, imag = (
        target(*parts(which), **{key: part(one, which) for key, one in kwargs.items()}) for which in ("real", "imag")
    )
    if isinstance(real, (list, tuple)):
        return [Pair(*both) for both in zip(real, imag, strict=True)]
    return Pair(real, imag)


def filled(node: fx.Node, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Pair:
    """A tensor of one number, as the op `name` makes it."""
    number = FILLED[name]
    if number is None:
        number = kwargs.get("fill_value", args[0] if name == "scalar_tensor" else args[-1])
    value, pair = node.meta["val"], as_pair(parted(number))
    options = {"dtype": value.real.dtype, "device": value.device}
    parts = (one if isinstance(one, Tensor) else torch.full((), one, **options) for one in (pair.real, pair.imag))
    return Pair(*(one.expand(value.shape).clone() for one in parts))
