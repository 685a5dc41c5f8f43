"""Pooling in two dimensions, and with that in one, written out by windows. Inputs are `[C, H, W]` or `[N, C, H, W]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pcr_fx.body.convolution_ops import padded, spread_apart, windows_of

aten = torch.ops.aten

# Places of a window, which are gone through one after another.
_MOST_PLACES = 64


def _pair(sizes: Sequence[int] | int) -> list[int]:
    both = [sizes] if isinstance(sizes, int) else list(sizes)
    return both * 2 if len(both) == 1 else both


def _folded(
    parts: Sequence[Tensor], x: Tensor, kernel: Sequence[int], stride: Any, padding: Any, dilation: Any
) -> Tensor:
    """The reverse of windows: the sum of all parts `[..., *out]`, one for each place in a window, where these places lie in `x`."""
    total = torch.zeros_like(x)
    for number, part in enumerate(parts):
        apart, pads = spread_apart(part, stride, first=part.dim() - 2), []
        for dim, place in ((1, number % kernel[1]), (0, number // kernel[1])):
            before = place * dilation[dim] - padding[dim]
            pads += [before, x.shape[dim - 2] - before - apart.shape[dim - 2]]
        total = total + F.pad(apart, pads)
    return total


# --- means --------------------------------------------------------------------------------------------------------------


def _avg_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] | int = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Any:
    if ceil_mode:
        return NotImplemented
    kernel, padding = _pair(kernel), _pair(padding)
    stride = _pair(stride or kernel)
    return _sums(x, kernel, stride, padding) / _counts(x, kernel, stride, padding, count_include_pad, divisor)


def _sums(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    return windows_of(padded(x, padding), kernel, stride, (1, 1), first=x.dim() - 2).sum([-2, -1])


def _counts(x: Tensor, kernel: Any, stride: Any, padding: Any, count_include_pad: bool, divisor: int | None) -> Any:
    """What sums are divided by."""
    if divisor is not None or count_include_pad or not any(padding):
        return divisor or kernel[0] * kernel[1]
    return _sums(torch.ones_like(x), kernel, stride, padding)


def _avg_pool_backward(
    cotangent: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Any:
    if ceil_mode:
        return NotImplemented
    kernel, padding = _pair(kernel), _pair(padding)
    stride = _pair(stride or kernel)
    part = cotangent / _counts(x, kernel, stride, padding, count_include_pad, divisor)
    return _folded([part] * (kernel[0] * kernel[1]), x, kernel, stride, padding, (1, 1))


# --- maxima -------------------------------------------------------------------------------------------------------------


def _first_of_windows(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """The largest number of each window, and its place in it: of several NaN the last, of nothing but -inf the first in `x`."""
    if kernel[0] * kernel[1] > _MOST_PLACES:
        return NotImplemented
    filled = F.pad(x, [padding[1], padding[1], padding[0], padding[0]], value=-torch.inf) if any(padding) else x
    windows = windows_of(filled, kernel, stride, dilation, first=x.dim() - 2).flatten(-2).unbind(-1)
    best, place = torch.full_like(windows[0], -torch.inf), _first_within(windows[0], kernel, stride, padding, dilation)
    for number, other in enumerate(windows):
        better = (other > best) | other.isnan()
        best, place = torch.where(better, other, best), torch.where(better, number, place)
    return best, place


def _first_within(like: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """The first place of each window that is not padding, of the shape of `like`."""
    skipped = []
    for dim in (0, 1):
        begins = torch.arange(like.shape[dim - 2], device=like.device) * stride[dim] - padding[dim]
        count = torch.zeros_like(begins)
        for number in range(kernel[dim] - 1):
            count = count + (begins + number * dilation[dim] < 0).to(torch.int64)
        skipped.append(count)
    return (skipped[0][:, None] * kernel[1] + skipped[1]).expand(like.shape)


def _max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] | int = 0,
    dilation: Sequence[int] | int = 1,
    ceil_mode: bool = False,
) -> Any:
    kernel, padding, dilation = _pair(kernel), _pair(padding), _pair(dilation)
    stride = _pair(stride or kernel)
    found = NotImplemented if ceil_mode else _first_of_windows(x, kernel, stride, padding, dilation)
    if found is NotImplemented:
        return found
    values, place = found
    rows = torch.arange(values.shape[-2], device=x.device)[:, None] * stride[0] - padding[0]
    columns = torch.arange(values.shape[-1], device=x.device) * stride[1] - padding[1]
    row = torch.zeros_like(place)  # of a window: kernels divide no whole numbers
    for begin in range(kernel[1], kernel[0] * kernel[1], kernel[1]):
        row = row + (place >= begin).to(torch.int64)
    columns = columns + (place - row * kernel[1]) * dilation[1]
    return values, (rows + row * dilation[0]) * x.shape[-1] + columns


def _max_pool_backward(
    cotangent: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Any:
    """Where the largest number stood is found out again, which takes no memory for its place."""
    kernel, padding, dilation = _pair(kernel), _pair(padding), _pair(dilation)
    stride = _pair(stride or kernel)
    found = NotImplemented if ceil_mode else _first_of_windows(x, kernel, stride, padding, dilation)
    if found is NotImplemented:
        return found
    parts = [torch.where(found[1] == number, cotangent, 0.0) for number in range(kernel[0] * kernel[1])]
    return _folded(parts, x, kernel, stride, padding, dilation)


# --- to a given size ----------------------------------------------------------------------------------------------------


def _kernel_for(x: Tensor, size: Sequence[int]) -> list[int] | None:
    """The window of pooling to a size; nothing where windows would differ."""
    if any(have % want for have, want in zip(x.shape[-2:], size, strict=True)):
        return None
    return [have // want for have, want in zip(x.shape[-2:], size, strict=True)]


def _adaptive_avg_pool(x: Tensor, size: Sequence[int]) -> Any:
    kernel = _kernel_for(x, size)
    return NotImplemented if kernel is None else _avg_pool(x, kernel)


def _adaptive_avg_pool_backward(cotangent: Tensor, x: Tensor) -> Any:
    kernel = _kernel_for(x, cotangent.shape[-2:])
    return NotImplemented if kernel is None else _avg_pool_backward(cotangent, x, kernel, [], [0], False, True, None)


def _adaptive_max_pool(x: Tensor, size: Sequence[int]) -> Any:
    kernel = _kernel_for(x, size)
    return NotImplemented if kernel is None else _max_pool(x, kernel)


def _adaptive_max_pool_backward(cotangent: Tensor, x: Tensor, indices: Tensor) -> Any:
    kernel = _kernel_for(x, cotangent.shape[-2:])
    return NotImplemented if kernel is None else _max_pool_backward(cotangent, x, kernel, [], [0], [1], False, indices)


POOLING_OPS: dict[Any, Callable[..., Any]] = {
    aten.avg_pool2d.default: _avg_pool,
    aten.avg_pool2d_backward.default: _avg_pool_backward,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    aten._adaptive_avg_pool2d.default: _adaptive_avg_pool,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_avg_pool_backward,
    aten.adaptive_max_pool2d.default: _adaptive_max_pool,
    aten.adaptive_max_pool2d_backward.default: _adaptive_max_pool_backward,
}
