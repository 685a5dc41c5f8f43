"""Ops of single numbers written out in simpler ones, from which kernels are lowered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def hypot(x: Tensor, y: Tensor) -> Tensor:
    """By the larger of both, so that nothing overflows on the way; infinite where either is, even beside NaN."""
    x, y = x.abs(), y.abs()
    large, small = torch.maximum(x, y), torch.minimum(x, y)
    ratio = small / torch.where(large == 0, 1.0, large)
    length = large * torch.sqrt(1 + ratio * ratio)
    return torch.where((x == torch.inf) | (y == torch.inf), torch.inf, length)


def signbit(x: Tensor) -> Tensor:
    """Of a zero by its reciprocal; of NaN it is false."""
    return (x < 0) | ((x == 0) & (1 / x < 0))


def copysign(x: Tensor, sign: Any) -> Any:
    if not isinstance(sign, Tensor) or not x.is_floating_point() or not sign.is_floating_point():
        return NotImplemented
    return torch.where(signbit(sign), -x.abs(), x.abs())


def isinf(x: Tensor) -> Any:
    return x.abs() == torch.inf if x.is_floating_point() else NotImplemented


def angle(x: Tensor) -> Any:
    """Of a real number, which is NaN where that is."""
    if not x.is_floating_point():
        return NotImplemented
    return torch.where(torch.isnan(x), x, torch.where(x < 0, torch.pi, torch.zeros_like(x)))


def round_decimals(x: Tensor, *, decimals: int) -> Tensor:
    """Scaled by a whole power of ten, so that nothing is rounded but by intent."""
    scale = float(10 ** abs(decimals))
    return torch.round(x * scale) / scale if decimals > 0 else torch.round(x / scale) * scale


def shrink_backward(cotangent: Tensor, x: Tensor, width: float) -> Tensor:
    """Of softshrink and of hardshrink; NaN is beyond any width."""
    return torch.where((x >= -width) & (x <= width), 0.0, cotangent)


def ldexp(x: Tensor, exponent: Tensor) -> Tensor:
    return x * torch.pow(2.0, exponent)


NUMBER_OPS: dict[Any, Callable[..., Any]] = {
    aten.hypot.default: hypot,
    aten.signbit.default: signbit,
    aten.copysign.Tensor: copysign,
    aten.isinf.default: isinf,
    aten.angle.default: angle,
    aten.round.decimals: round_decimals,
    aten.softshrink_backward.default: shrink_backward,
    aten.hardshrink_backward.default: shrink_backward,
    aten.ldexp.Tensor: ldexp,
}
