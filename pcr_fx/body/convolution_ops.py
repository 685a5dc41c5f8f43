"""Convolutions written out as products of windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def windows_of(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], first: int = 2
) -> Tensor:
    """`[N, C, *out, *kernel]` of `[N, C, *size]`, whose dimension `first` is the first of those sizes: a view."""
    for dim, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), first):
        x = x.unfold(dim, gap * (size - 1) + 1, step)[..., ::gap]
    return x


def _padded(x: Tensor, padding: Sequence[int]) -> Tensor:
    return F.pad(x, [amount for size in reversed(padding) for amount in (size, size)]) if any(padding) else x


def _grouped(x: Tensor, groups: int, dim: int) -> Tensor:
    return x.unflatten(dim, (groups, -1))


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    """Sums over windows. `x` is `[N, C, *size]`, `weight` `[O, C / groups, *kernel]`."""
    spatial = weight.dim() - 2
    if transposed or x.dim() != spatial + 2:
        return NotImplemented
    windows = _grouped(windows_of(_padded(x, padding), weight.shape[2:], stride, dilation), groups, 1)
    # [N, G, 1, C / G, *out, *kernel] times [G, O / G, C / G, *1, *kernel].
    weights = _grouped(weight, groups, 0)[(slice(None),) * 3 + (None,) * spatial]
    summed = [3, *range(4 + spatial, 4 + 2 * spatial)]
    result = (windows.unsqueeze(2) * weights).sum(summed).flatten(1, 2)
    return result if bias is None else result + bias.view(-1, *(1 for _ in range(spatial)))


def _convolution_backward(
    cotangent: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Any:
    spatial = weight.dim() - 2
    if transposed or x.dim() != spatial + 2:
        return NotImplemented
    of_x = of_weight = of_bias = None
    if output_mask[1]:
        windows = _grouped(windows_of(_padded(x, padding), weight.shape[2:], stride, dilation), groups, 1).unsqueeze(2)
        rows = _grouped(cotangent, groups, 1).unsqueeze(3)[(..., *(None,) * spatial)]
        of_weight = (windows * rows).sum([0, *range(4, 4 + spatial)]).flatten(0, 1)
    if output_mask[0]:
        of_x = _convolution_backward_of_input(cotangent, x, weight, stride, padding, dilation, groups)
    if output_mask[2]:
        of_bias = cotangent.sum([0, *range(2, 2 + spatial)])
    return of_x, of_weight, of_bias


def spread_apart(x: Tensor, stride: Sequence[int], first: int = 2) -> Tensor:
    """With as many zeros between the numbers of some dimensions as steps of `stride` skip, from dimension `first` on."""
    for dim, step in enumerate(stride, first):
        if step > 1:
            sizes = list(x.shape)
            sizes[dim] = (sizes[dim] - 1) * step + 1
            x = torch.slice_scatter(x.new_zeros(sizes), x, dim, 0, None, step)
    return x


def _convolution_backward_of_input(
    cotangent: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The cotangent, with zeros between its numbers where the stride skips some, convolved with the reversed weights."""
    spatial, spread = weight.dim() - 2, spread_apart(cotangent, stride)
    pads = []
    for dim in reversed(range(2, 2 + spatial)):
        reach = dilation[dim - 2] * (weight.shape[dim] - 1)
        before = reach - padding[dim - 2]
        pads += [before, x.shape[dim] + reach - before - spread.shape[dim]]
    flipped = _grouped(weight.flip(list(range(2, 2 + spatial))), groups, 0).transpose(1, 2).flatten(0, 1)
    ones, zeros = [1] * spatial, [0] * spatial
    return _convolution(F.pad(spread, pads), flipped, None, ones, zeros, dilation, False, zeros, groups)


CONVOLUTION_OPS: dict[Any, Callable[..., Any]] = {
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
}
