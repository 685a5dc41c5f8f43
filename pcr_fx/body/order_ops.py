"""Ops along a dimension, written out number by number where there are few of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

# Numbers along a dimension that are compared each with each, and that are gone through one after another.
_MAX_COMPARED, _MAX_IN_TURN = 16, 64


def _running(combine: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """All results of combining the numbers along a dimension one after another."""

    def running(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
        if x.dim() == 0 or not 0 < x.shape[dim] <= _MAX_IN_TURN:
            return NotImplemented
        first, *others = (x if dtype is None else x.to(dtype)).unbind(dim)
        results = [first]
        for other in others:
            results.append(combine(results[-1], other))
        return torch.stack(results, dim)

    return running


def _running_best(is_better: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """The best numbers so far along a dimension, and where they are: the last of equal ones, and NaN before all others."""

    def running(x: Tensor, dim: int) -> Any:
        if x.dim() == 0 or not 0 < x.shape[dim] <= _MAX_IN_TURN:
            return NotImplemented
        best, *others = x.unbind(dim)
        place = torch.zeros_like(best, dtype=torch.int64)
        values, places = [best], [place]
        for index, other in enumerate(others, 1):
            better = is_better(other, best)
            if x.is_floating_point():
                better = other.isnan() | (better & ~best.isnan())
            best, place = torch.where(better, other, best), torch.where(better, index, place)
            values.append(best)
            places.append(place)
        return torch.stack(values, dim), torch.stack(places, dim)

    return running


def _product(x: Tensor, dim: int | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    if dim is None:
        x, dim = x.reshape(-1), 0
    running = _running(torch.mul)(x, dim, dtype=dtype)
    if running is NotImplemented:
        return running
    return running.narrow(dim, -1, 1) if keepdim else running.select(dim, -1)


def _before(a: Tensor, b: Tensor, descending: bool) -> Tensor:
    """Whether a number stands before another in order; NaN is the largest."""
    if descending:
        a, b = b, a
    return (a < b) | (b.isnan() & ~a.isnan()) if a.is_floating_point() else a < b


def _first_in_order(descending: bool) -> Callable[..., Any]:
    """The largest or smallest number along a dimension, and where it first is: NaN before all others, as in PyTorch."""

    def first(x: Tensor, dim: int, keepdim: bool = False) -> Any:
        if x.dim() == 0 or not 0 < x.shape[dim] <= _MAX_IN_TURN:
            return NotImplemented
        best, *others = x.unbind(dim)
        place = torch.zeros_like(best, dtype=torch.int64)
        for index, other in enumerate(others, 1):
            better = other > best if descending else other < best
            if x.is_floating_point():
                better = better | (other.isnan() & ~best.isnan())
            best, place = torch.where(better, other, best), torch.where(better, index, place)
        return (best.unsqueeze(dim), place.unsqueeze(dim)) if keepdim else (best, place)

    return first


def _place_of_first(descending: bool) -> Callable[..., Any]:
    first = _first_in_order(descending)

    def place(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
        if dim is None and keepdim:
            return NotImplemented
        found = first(x.reshape(-1), 0) if dim is None else first(x, dim, keepdim)
        return found if found is NotImplemented else found[1]

    return place


def _sorted(x: Tensor, dim: int = -1, descending: bool = False) -> Any:
    """Each number goes to the place that is the count of those before it; equal ones stay in order."""
    if x.dim() == 0 or not 0 < x.shape[dim] <= _MAX_COMPARED:
        return NotImplemented
    parts = x.unbind(dim)
    ranks = []
    for index, part in enumerate(parts):
        rank = torch.zeros_like(part, dtype=torch.int64)
        for other_index, other in enumerate(parts):
            if other_index < index:
                rank = rank + (~_before(part, other, descending)).to(torch.int64)
            elif other_index > index:
                rank = rank + _before(other, part, descending).to(torch.int64)
        ranks.append(rank)
    values, places = [], []
    for wanted in range(len(parts)):
        value, place = parts[0], torch.zeros_like(ranks[0])
        for index in range(1, len(parts)):
            here = ranks[index] == wanted
            value, place = torch.where(here, parts[index], value), torch.where(here, index, place)
        values.append(value)
        places.append(place)
    return torch.stack(values, dim), torch.stack(places, dim)


def _stably_sorted(x: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    return _sorted(x, dim, descending)


def _largest(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    found = _sorted(x, dim, largest)
    return found if found is NotImplemented else tuple(part.narrow(dim, 0, k) for part in found)


def _kth(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    """The k-th number in order, counted from 1; NaN is the largest."""
    found = _sorted(x, dim)
    if found is NotImplemented:
        return found
    taken = [part.narrow(dim, k - 1, 1) for part in found]
    return tuple(taken) if keepdim else tuple(part.squeeze(dim) for part in taken)


def _median(x: Tensor, dim: int, keepdim: bool = False) -> Any:
    """The lower one of two in the middle; NaN where there is one."""
    found = _sorted(x, dim)
    if found is NotImplemented:
        return found
    middle, last = (
        [part.narrow(dim, place, 1) for part in found] for place in ((x.shape[dim] - 1) // 2, x.shape[dim] - 1)
    )
    if x.is_floating_point():
        middle = [torch.where(last[0].isnan(), there, here) for here, there in zip(middle, last, strict=True)]
    return tuple(middle) if keepdim else tuple(part.squeeze(dim) for part in middle)


ORDER_OPS: dict[Any, Callable[..., Any]] = {
    aten.cumsum.default: _running(torch.add),
    aten.cumprod.default: _running(torch.mul),
    aten.logcumsumexp.default: _running(torch.logaddexp),
    aten.cummax.default: _running_best(torch.ge),
    aten.cummin.default: _running_best(torch.le),
    aten.prod.default: lambda x, *, dtype=None: _product(x, dtype=dtype),
    aten.prod.dim_int: _product,
    aten.topk.default: _largest,
    aten.median.dim: _median,
    aten.kthvalue.default: _kth,
    aten.max.dim: _first_in_order(descending=True),
    aten.min.dim: _first_in_order(descending=False),
    aten.argmax.default: _place_of_first(descending=True),
    aten.argmin.default: _place_of_first(descending=False),
    aten.sort.default: _sorted,
    aten.sort.stable: _stably_sorted,
}
