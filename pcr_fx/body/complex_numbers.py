"""Arithmetic and functions of complex numbers by their real and imaginary parts: what kernels of complex bodies are made of.

Each rule takes the arguments of the op, complex ones as `Pair` and real ones as they are. In products a real number is no
complex one with an imaginary part of zero: it costs half as much, and gives the same for all finite numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pair:
    """A complex tensor, or a complex number, by its real and its imaginary part."""

    real: Any
    imag: Any


Number: TypeAlias = "Pair | Tensor | float"


def parted(value: Any) -> Any:
    """A complex number of Python's as a `Pair`; anything else as it is."""
    return Pair(value.real, value.imag) if isinstance(value, complex) else value


def as_pair(value: Number) -> Pair:
    if isinstance(value, Pair):
        return value
    return Pair(value, torch.zeros_like(value) if isinstance(value, Tensor) else 0.0)


# --- arithmetic ---------------------------------------------------------------------------------------------------------


def scaled(value: Number, factor: Any) -> Any:
    return value if isinstance(factor, (int, float)) and factor == 1 else mul(value, factor)


def add(a: Number, b: Number, *, alpha: Any = 1) -> Any:
    b = scaled(b, parted(alpha))
    if isinstance(a, Pair) and isinstance(b, Pair):
        return Pair(a.real + b.real, a.imag + b.imag)
    if not isinstance(a, Pair) and not isinstance(b, Pair):
        return a + b
    pair, other = (a, b) if isinstance(a, Pair) else (b, a)
    assert isinstance(pair, Pair)
    real = pair.real + other
    return Pair(real, _spread(pair.imag, real))


def _spread(part: Any, like: Any) -> Any:
    """A part in the shape of the other one, which was broadcast."""
    if not isinstance(like, Tensor):
        return part
    if not isinstance(part, Tensor):
        return torch.full_like(like, part)
    return part if part.shape == like.shape else part.expand(like.shape)


def neg(a: Number) -> Any:
    return Pair(-a.real, -a.imag) if isinstance(a, Pair) else -a


def sub(a: Number, b: Number, *, alpha: Any = 1) -> Any:
    return add(a, neg(b), alpha=alpha)


def mul(a: Number, b: Number) -> Any:
    if isinstance(a, Pair) and isinstance(b, Pair):
        real = _difference(_times(a.real, b.real), _times(a.imag, b.imag))
        return _whole(real, _total(_times(a.real, b.imag), _times(a.imag, b.real)))
    if isinstance(a, Pair):
        return _whole(_times(a.real, b), _times(a.imag, b))
    return _whole(_times(a, b.real), _times(a, b.imag)) if isinstance(b, Pair) else a * b


def _times(a: Any, b: Any) -> Any:
    """The product of two parts; `None` for zero, where a number of the model's source is."""
    if any(isinstance(one, (int, float)) and one == 0 for one in (a, b)):
        return None
    if any(isinstance(one, (int, float)) and one == 1 for one in (a, b)):
        return b if isinstance(a, (int, float)) and a == 1 else a
    return a * b


def _total(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


def _difference(a: Any, b: Any) -> Any:
    return (None if b is None else -b) if a is None else a if b is None else a - b


def _whole(real: Any, imag: Any) -> Pair:
    """A pair of parts of which one may be nothing."""
    if real is None:
        real = torch.zeros_like(imag) if isinstance(imag, Tensor) else 0.0
    if imag is None:
        imag = torch.zeros_like(real) if isinstance(real, Tensor) else 0.0
    return Pair(real, imag)


def conj(a: Number) -> Any:
    return Pair(a.real, -a.imag) if isinstance(a, Pair) else a


def reciprocal(a: Number) -> Any:
    return div(1.0, a)


def div(a: Number, b: Number) -> Any:
    """As PyTorch divides: by the larger of both parts first, so that nothing overflows on the way."""
    if not isinstance(b, Pair):
        return Pair(a.real / b, a.imag / b) if isinstance(a, Pair) else a / b
    if not isinstance(b.real, Tensor):
        inverse = 1 / complex(b.real, b.imag)
        return mul(a, Pair(inverse.real, inverse.imag))
    above = a if isinstance(a, Pair) else Pair(a, 0.0)
    is_real = b.real.abs() >= b.imag.abs()
    large, small = torch.where(is_real, b.real, b.imag), torch.where(is_real, b.imag, b.real)
    rest = torch.where(large == 0, large, small / large)
    scale = 1 / (large + small * rest)
    # (x + iy) (1 - i rest), or with both exchanged; a real one has no y.
    x, y = above.real, above.imag
    if not isinstance(a, Pair):
        return Pair(x * torch.where(is_real, 1.0, rest) * scale, -x * torch.where(is_real, rest, 1.0) * scale)
    real = torch.where(is_real, x + y * rest, x * rest + y)
    imag = torch.where(is_real, y - x * rest, y * rest - x)
    return Pair(real * scale, imag * scale)


# --- functions of one number --------------------------------------------------------------------------------------------


def absolute(a: Pair) -> Tensor:
    return torch.hypot(a.real, a.imag)


def angle(a: Pair) -> Tensor:
    return torch.atan2(a.imag, a.real)


def sgn(a: Pair) -> Pair:
    size = absolute(a)
    divisor = torch.where(size == 0, 1.0, size)
    return Pair(a.real / divisor, a.imag / divisor)


def exp(a: Pair) -> Pair:
    """Of a real number it is one, also where it is infinite."""
    result = polar(torch.exp(a.real), a.imag)
    return Pair(result.real, torch.where(a.imag == 0, a.imag, result.imag))


def log(a: Pair) -> Pair:
    return Pair(torch.log(absolute(a)), angle(a))


def sqrt(a: Pair) -> Pair:
    """By the half of the plane that the number is in: no cancellation."""
    root = torch.sqrt((absolute(a) + a.real.abs()) / 2)
    other = torch.where(root == 0, root, a.imag.abs() / (2 * torch.where(root == 0, 1.0, root)))
    sign = torch.where(torch.signbit(a.imag), -torch.ones_like(root), 1.0)
    right = a.real >= 0
    return Pair(torch.where(right, root, other), torch.where(right, other, root) * sign)


def power(a: Number, b: Number) -> Any:
    """Small whole exponents by products, as PyTorch has them; any other by the logarithm. Of zero a positive one is zero."""
    if isinstance(b, (int, float)) and b == int(b) and 0 < abs(b) <= 3:
        result = a
        for _ in range(int(abs(b)) - 1):
            result = mul(result, a)
        return result if b > 0 else reciprocal(result)
    if isinstance(b, (int, float)) and b == 0.5:
        return sqrt(as_pair(a))
    if isinstance(a, (int, float)):
        return exp(mul(b, math.log(a))) if a > 0 else NotImplemented
    if isinstance(b, (int, float)) and b < 0:
        return reciprocal(power(a, -b))
    base = as_pair(a)
    if isinstance(b, (int, float)) and b == 0:
        return Pair(torch.ones_like(base.real), torch.zeros_like(base.real))
    result = exp(mul(log(base), b))
    is_zero = (base.real == 0) & (base.imag == 0) & ((b.real if isinstance(b, Pair) else torch.as_tensor(b)) > 0)
    return Pair(torch.where(is_zero, 0.0, result.real), torch.where(is_zero, 0.0, result.imag))


def polar(size: Any, angle: Any) -> Pair:
    return Pair(size * torch.cos(angle), size * torch.sin(angle))


def sin(a: Pair) -> Pair:
    return Pair(torch.sin(a.real) * torch.cosh(a.imag), torch.cos(a.real) * torch.sinh(a.imag))


def cos(a: Pair) -> Pair:
    return Pair(torch.cos(a.real) * torch.cosh(a.imag), -torch.sin(a.real) * torch.sinh(a.imag))


def times_i(a: Pair) -> Pair:
    return Pair(-a.imag, a.real)


def over_i(a: Pair) -> Pair:
    return Pair(a.imag, -a.real)


def sinh(a: Pair) -> Pair:
    return over_i(sin(times_i(a)))


def cosh(a: Pair) -> Pair:
    return cos(times_i(a))


def tanh(a: Pair) -> Any:
    real, imag = torch.tanh(a.real), torch.tan(a.imag)
    return div(Pair(real, imag), Pair(torch.ones_like(real), real * imag))


def sigmoid(a: Pair) -> Any:
    return reciprocal(add(exp(neg(a)), 1.0))


def tanh_backward(cotangent: Number, result: Number) -> Any:
    return mul(cotangent, conj(sub(1.0, mul(result, result))))


def sigmoid_backward(cotangent: Number, result: Number) -> Any:
    return mul(cotangent, conj(mul(sub(1.0, result), result)))
