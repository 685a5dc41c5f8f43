"""Layouts: where the labels of candidate batch dimensions are in a tensor, and how they move with its shape."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple


class Factor(NamedTuple):
    """A part of a dimension: all of a labelled dimension of the states, or anything else (no label)."""

    label: int | None
    size: int


Dimension = tuple[Factor, ...]  # major to minor; () is opaque: no label, whatever the size
Layout = tuple[Dimension, ...]


def _size(factors: Dimension) -> int:
    return math.prod(factor.size for factor in factors)


def places(layout: Layout) -> dict[int, tuple[int, int]]:
    """Where each label is: (dimension, stride within the dimension)."""
    found: dict[int, tuple[int, int]] = {}
    for dim, factors in enumerate(layout):
        stride = 1
        for factor in reversed(factors):
            if factor.label is not None:
                found[factor.label] = (dim, stride)
            stride *= factor.size
    return found


def fit(layout: Layout, shape: Sequence[int]) -> Layout:
    """`layout` for a result of `shape`: a dimension of another size, as in a broadcast, is opaque."""
    return tuple(
        factors if _size(factors) == size else (Factor(None, size),)
        for factors, size in zip(layout, shape, strict=True)
    )


def align(layout: Layout, rank: int) -> Layout:
    """`layout` in the last of `rank` dimensions, as in a broadcast."""
    return ((),) * (rank - len(layout)) + layout


def blank(layout: Layout, dims: Collection[int]) -> Layout:
    """`layout` with `dims` opaque."""
    return tuple(() if dim in dims else factors for dim, factors in enumerate(layout))


def regroup(layout: Layout, shape: Sequence[int]) -> Layout | None:
    """The layout of a view with `shape`: factors join and split as the sizes ask; a cut label is lost.

    Factors of size 1 fit anywhere. They go one each to dimensions of size 1 of the result in the same place, and the
    rest into the dimension before, so that [B, 1, w] -> [B, w] -> [B, 1, w] keeps both labels.
    """
    pending = deque(factor for factors in layout for factor in factors or (Factor(None, 1),))
    total = _size(tuple(pending))
    if total == 0 or total != math.prod(shape):
        return None
    dimensions = []
    for size, following in zip(shape, (*shape[1:], None), strict=True):
        factors = _take(pending, size)
        if size == 1 and pending and pending[0].size == 1:
            factors.append(pending.popleft())
        while following != 1 and pending and pending[0].size == 1:
            factors.append(pending.popleft())
        dimensions.append(tuple(factors))
    return tuple(dimensions)


def _take(pending: deque[Factor], size: int) -> list[Factor]:
    """Take factors of total `size`, which divides the total of all, from the front of `pending`."""
    taken: list[Factor] = []
    need = size
    while need > 1:
        factor = pending.popleft()
        if need % factor.size == 0:
            taken.append(factor)
            need //= factor.size
        elif factor.size % need == 0:
            taken.append(Factor(None, need))
            pending.appendleft(Factor(None, factor.size // need))
            need = 1
        else:  # the boundary cuts through factors, as in [4, 3] -> [3, 4]: melt them and start again
            melted = [*taken, factor, *([pending.popleft()] if pending else [])]
            pending.appendleft(Factor(None, _size(tuple(melted))))
            taken, need = [], size
    return taken
