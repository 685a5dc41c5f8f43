"""Pooling in two dimensions, and with that in one, written out by windows. Inputs are `[C, H, W]` or `[N, C, H, W]`.

And the other way: what is resized, in one dimension.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pcr_fx.body.convolution_ops import spread_apart, windows_of

aten = torch.ops.aten

# Places of a window, which are gone through one after another.
_MOST_PLACES = 64
Sizes = Sequence[int] | int


class _Windows(NamedTuple):
    """How windows lie in the last two dimensions of a tensor."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]

    @classmethod
    def of(cls, kernel: Sizes, stride: Sizes = (), padding: Sizes = 0, dilation: Sizes = 1) -> _Windows:
        """As PyTorch's ops are told: one number for both dimensions, and no stride for windows side by side."""
        return cls(_pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation))

    @property
    def places(self) -> int:
        """Those of one window."""
        return self.kernel[0] * self.kernel[1]

    def parts(self, x: Tensor, fill: float) -> tuple[Tensor, ...]:
        """For each place in a window what stands there, `[..., *out]`."""
        vertical, horizontal = self.padding
        if any(self.padding):
            x = F.pad(x, [horizontal, horizontal, vertical, vertical], value=fill)
        windows = windows_of(x, self.kernel, self.stride, self.dilation, first=x.dim() - 2)
        return windows.flatten(-2).unbind(-1)

    def folded(self, parts: Sequence[Tensor], x: Tensor) -> Tensor:
        """The reverse: the sum of all parts where their places lie in `x`, of its shape."""
        total = torch.zeros_like(x)
        for number, part in enumerate(parts):
            apart, pads = spread_apart(part, self.stride, first=part.dim() - 2), []
            for dim, place in ((1, number % self.kernel[1]), (0, number // self.kernel[1])):
                before = place * self.dilation[dim] - self.padding[dim]
                pads += [before, x.shape[dim - 2] - before - apart.shape[dim - 2]]
            total = total + F.pad(apart, pads)
        return total


def _pair(sizes: Sizes) -> list[int]:
    both = [sizes] if isinstance(sizes, int) else list(sizes)
    return both * 2 if len(both) == 1 else both


# --- means --------------------------------------------------------------------------------------------------------------


def _sums(windows: _Windows, x: Tensor) -> Tensor:
    return torch.stack(windows.parts(x, 0.0), -1).sum(-1)


def _counts(windows: _Windows, x: Tensor, count_include_pad: bool, divisor: int | None) -> Any:
    """What sums are divided by."""
    if divisor is not None or count_include_pad or not any(windows.padding):
        return divisor or windows.places
    return _sums(windows, torch.ones_like(x))


def _avg_pool(
    x: Tensor,
    kernel: Sizes,
    stride: Sizes = (),
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Any:
    windows = _Windows.of(kernel, stride, padding)
    if ceil_mode or windows.places > _MOST_PLACES:
        return NotImplemented
    return _sums(windows, x) / _counts(windows, x, count_include_pad, divisor)


def _avg_pool_backward(cotangent: Tensor, x: Tensor, kernel: Sizes, stride: Sizes, padding: Sizes, *how: Any) -> Any:
    """`how`: `ceil_mode`, `count_include_pad` and the divisor."""
    windows, ceil_mode = _Windows.of(kernel, stride, padding), how[0]
    if ceil_mode or windows.places > _MOST_PLACES:
        return NotImplemented
    part = cotangent / _counts(windows, x, *how[1:])
    return windows.folded([part] * windows.places, x)


# --- maxima -------------------------------------------------------------------------------------------------------------


def _largest(windows: _Windows, x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest number of each window, and its place in it: of several NaN the last, of nothing but -inf the first in `x`."""
    parts = windows.parts(x, -torch.inf)
    best, place = torch.full_like(parts[0], -torch.inf), _first_within(windows, parts[0])
    for number, other in enumerate(parts):
        better = (other > best) | other.isnan()
        best, place = torch.where(better, other, best), torch.where(better, number, place)
    return best, place


def _begins(windows: _Windows, like: Tensor, dim: int) -> Tensor:
    """Where in one dimension windows begin, of which padding comes before 0."""
    return torch.arange(like.shape[dim - 2], device=like.device) * windows.stride[dim] - windows.padding[dim]


def _first_within(windows: _Windows, like: Tensor) -> Tensor:
    """The first place of each window that is not padding, of the shape of `like`."""
    skipped = []
    for dim in (0, 1):
        begins = _begins(windows, like, dim)
        count = torch.zeros_like(begins)
        for number in range(windows.kernel[dim] - 1):
            count = count + (begins + number * windows.dilation[dim] < 0).to(torch.int64)
        skipped.append(count)
    return (skipped[0][:, None] * windows.kernel[1] + skipped[1]).expand(like.shape)


def _max_pool(
    x: Tensor, kernel: Sizes, stride: Sizes = (), padding: Sizes = 0, dilation: Sizes = 1, ceil_mode: bool = False
) -> Any:
    windows = _Windows.of(kernel, stride, padding, dilation)
    if ceil_mode or windows.places > _MOST_PLACES:
        return NotImplemented
    (values, place), width = _largest(windows, x), windows.kernel[1]
    row = torch.zeros_like(place)  # of a window: kernels divide no whole numbers
    for begin in range(width, windows.places, width):
        row = row + (place >= begin).to(torch.int64)
    rows = _begins(windows, values, 0)[:, None] + row * windows.dilation[0]
    columns = _begins(windows, values, 1) + (place - row * width) * windows.dilation[1]
    return values, rows * x.shape[-1] + columns


def _max_pool_backward(
    cotangent: Tensor,
    x: Tensor,
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    ceil_mode: bool,
    indices: Tensor,
) -> Any:
    """Where the largest number stood is found out again, which takes no memory for its place."""
    windows = _Windows.of(kernel, stride, padding, dilation)
    if ceil_mode or windows.places > _MOST_PLACES:
        return NotImplemented
    _, place = _largest(windows, x)
    return windows.folded([torch.where(place == number, cotangent, 0.0) for number in range(windows.places)], x)


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
    return NotImplemented if kernel is None else _avg_pool_backward(cotangent, x, kernel, (), 0, False, True, None)


def _adaptive_max_pool(x: Tensor, size: Sequence[int]) -> Any:
    kernel = _kernel_for(x, size)
    return NotImplemented if kernel is None else _max_pool(x, kernel)


def _adaptive_max_pool_backward(cotangent: Tensor, x: Tensor, indices: Tensor) -> Any:
    kernel = _kernel_for(x, cotangent.shape[-2:])
    return NotImplemented if kernel is None else _max_pool_backward(cotangent, x, kernel, (), 0, 1, False, indices)


# --- one size for another ------------------------------------------------------------------------------------------------


def _resized_backward(weights: Callable[..., list[list[float]]]) -> Callable[..., Any]:
    """The cotangent of `[N, C, size]` of which each number of another size is a sum, with weights."""

    def backward(cotangent: Tensor, output_size: Sequence[int], input_size: Sequence[int], *how: Any) -> Any:
        if max(output_size[0], input_size[-1]) > _MOST_PLACES:
            return NotImplemented
        sums = [torch.zeros_like(cotangent[..., 0]) for _ in range(input_size[-1])]
        for part, row in zip(cotangent.unbind(-1), weights(output_size[0], input_size[-1], *how), strict=True):
            sums = [one if weight == 0 else one + part * weight for one, weight in zip(sums, row, strict=True)]
        return torch.stack(sums, -1)

    return backward


def _nearest(outputs: int, inputs: int, scale: float | None = None) -> list[list[float]]:
    """In single precision, as PyTorch finds the places."""
    ratio = _single(inputs / outputs if scale is None or scale <= 0 else 1 / scale)
    places = [min(int(_single(index * ratio)), inputs - 1) for index in range(outputs)]
    return [[float(place == index) for index in range(inputs)] for place in places]


def _single(number: float) -> float:
    return float(struct.unpack("f", struct.pack("f", number))[0])


def _linear(outputs: int, inputs: int, align_corners: bool, scale: float | None = None) -> list[list[float]]:
    if align_corners:
        points = [index * (inputs - 1) / (outputs - 1) if outputs > 1 else 0.0 for index in range(outputs)]
    else:
        ratio = inputs / outputs if scale is None or scale <= 0 else 1 / scale
        points = [max((index + 0.5) * ratio - 0.5, 0.0) for index in range(outputs)]
    rows = [[0.0] * inputs for _ in points]
    for row, point in zip(rows, points, strict=True):
        below = min(int(point), inputs - 1)
        share = min(max(point - below, 0.0), 1.0)
        row[below] += 1 - share
        row[min(below + 1, inputs - 1)] += share
    return rows


POOLING_OPS: dict[Any, Callable[..., Any]] = {
    aten.upsample_nearest1d_backward.default: _resized_backward(_nearest),
    aten.upsample_linear1d_backward.default: _resized_backward(_linear),
    aten.avg_pool2d.default: _avg_pool,
    aten.avg_pool2d_backward.default: _avg_pool_backward,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    aten._adaptive_avg_pool2d.default: _adaptive_avg_pool,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_avg_pool_backward,
    aten.adaptive_max_pool2d.default: _adaptive_max_pool,
    aten.adaptive_max_pool2d_backward.default: _adaptive_max_pool_backward,
}
