"""Rules of ops that read or write at places that tensors name.

Where the places are constants, each number is moved by itself, or with its neighbours where those move alike. Where they are
computed, a number is chosen among all that there are along a dimension, which are few.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from pcr_fx.codegen.ir import (
    Apply,
    Constant,
    Expression,
    Load,
    Unprintable,
    Value,
    View,
    contiguous,
    in_memory,
    map_views,
    places,
    views,
)
from pcr_fx.graphs.nodes import arguments_of

if TYPE_CHECKING:
    from pcr_fx.codegen.lower import Lowering

# Moves that are written out, one after another; numbers that one is chosen among.
_MAX_MOVES, _MAX_CHOICES = 1024, 64


# --- at constant places -------------------------------------------------------------------------------------------------


def _move(lowering: Lowering, source: Value, taken: Sequence[int], shape: Sequence[int]) -> Value:
    """A tensor of `shape` whose numbers are those of `source` at the places `taken`, both in order."""
    source = lowering.loaded(source)
    if isinstance(source.expression, Constant):
        return Value(tuple(shape), source.expression)
    view = _view_of(source)
    addresses = places(view, source.shape).reshape(-1)[list(taken)].tolist()
    runs = list(_runs(addresses))
    if len(runs) > _MAX_MOVES:
        raise Unprintable(f"no kernel is printed for {len(runs)} moves of numbers to places of their own")
    result = lowering.local(shape, view.buffer.varying)
    for first, count, step in runs:
        place = Value((count,), Load(View(result, (1,), first)))
        lowering.write(place, Value((count,), Load(View(view.buffer, (step,), addresses[first]))))
    return in_memory(result, tuple(shape))


def _view_of(value: Value) -> View:
    assert isinstance(value.expression, Load)
    return value.expression.view


def _runs(addresses: Sequence[int]) -> Any:
    """Stretches of equal steps: where each begins, how long it is, its step."""
    first = 0
    while first < len(addresses):
        count, step = 1, 1
        if first + 1 < len(addresses):
            step = addresses[first + 1] - addresses[first]
            while first + count < len(addresses) and addresses[first + count] - addresses[first + count - 1] == step:
                count += 1
        yield first, count, step
        first += count


def _numbered(shape: Sequence[int]) -> Tensor:
    """A tensor that has at each place its number."""
    return torch.arange(torch.Size(shape).numel()).reshape(tuple(shape))


def _element(value: Value, place: int) -> Expression:
    """One number of a value that is in memory, or a constant."""
    if isinstance(value.expression, Constant):
        return value.expression
    view = _view_of(value)
    return Load(View(view.buffer, (), int(places(view, value.shape).reshape(-1)[place])))


def _written(lowering: Lowering, base: Value, source: Value, into: Sequence[int], adds: bool) -> Value:
    """`base` with the numbers of `source`, in order, written at the places `into`, or added there."""
    base, source = lowering.loaded(base), lowering.loaded(source)
    if len(into) > _MAX_MOVES:
        raise Unprintable(f"no kernel is printed for {len(into)} moves of numbers to places of their own")
    found: dict[int, Expression] = {}
    for index, place in enumerate(into):
        number = _element(source, index)
        found[place] = Apply("add", (found.get(place) or _element(base, place), number)) if adds else number
    varying = any(view.buffer.varying for value in (base, source) for view in views(value.expression))
    result = lowering.local(base.shape, varying)
    lowering.write(in_memory(result, base.shape), base)
    for place, number in found.items():
        lowering.write(Value((), Load(View(result, (), place))), Value((), number))
    return in_memory(result, base.shape)


# --- at places that are computed ----------------------------------------------------------------------------------------


def _check_choices(lowering: Lowering, index: fx.Node, size: int) -> None:
    if size > _MAX_CHOICES:
        raise Unprintable(f"no kernel is printed for a choice among {size} numbers")
    if not lowering.whole.sizes.get(index, float("inf")) < size:
        raise Unprintable("no kernel is printed for an index that may be out of range")


def _is_at(index: Expression, place: int, size: int) -> Expression:
    """Whether an index, which may count from the end, is that of a place."""
    forward = Apply("eq", (index, Constant(float(place))))
    return Apply("logical_or", (forward, Apply("eq", (index, Constant(float(place - size))))))


def _part(value: Value, dim: int, place: int) -> Value:
    """`value.select(dim, place)`."""

    def change(view: View) -> View:
        offset = view.offset + place * view.strides[dim]
        return View(view.buffer, (*view.strides[:dim], *view.strides[dim + 1 :]), offset)

    return Value((*value.shape[:dim], *value.shape[dim + 1 :]), map_views(value.expression, change))


def _spread(value: Value, dim: int, size: int) -> Expression:
    """An expression of a value without `dim` over indices with it."""

    def change(view: View) -> View:
        return View(view.buffer, (*view.strides[:dim], 0, *view.strides[dim:]), view.offset)

    return map_views(value.expression, change)


def _chosen(lowering: Lowering, source: Value, dim: int, index: Value) -> Value:
    """`gather`: of `index`'s shape, which is `source`'s but along `dim`."""
    source, index = lowering.loaded(source), lowering.loaded(index)
    size = source.shape[dim]

    def at(place: int) -> Expression:
        cut = _part(source, dim, place)
        return _spread(cut, dim, index.shape[dim])

    result = at(0)
    for place in range(1, size):
        result = Apply("where", (_is_at(index.expression, place, size), at(place), result))
    return Value(index.shape, result)


def _chosen_places(lowering: Lowering, base: Value, dim: int, index: Value, source: Value, adds: bool) -> Value:
    """`scatter` and `scatter_add`, with as many numbers as `base` along the other dimensions."""
    base, index, source = map(lowering.loaded, (base, index, source))
    size, others = base.shape[dim], base.shape[:dim] + base.shape[dim + 1 :]
    result = lowering.local(base.shape, True)
    strides = contiguous(base.shape)
    for place in range(size):
        value = _part(base, dim, place).expression
        for number in range(index.shape[dim]):
            here = _is_at(_part(index, dim, number).expression, place, size)
            written = _part(source, dim, number).expression
            value = Apply("where", (here, Apply("add", (value, written)) if adds else written, value))
        out = View(result, (*strides[:dim], *strides[dim + 1 :]), place * strides[dim])
        lowering.write(Value(others, Load(out)), Value(others, value))
    return in_memory(result, base.shape)


# --- rules --------------------------------------------------------------------------------------------------------------


def gathered(lowering: Lowering, node: fx.Node) -> Value:
    given = arguments_of(node)
    source, dim = lowering.tensor(given["self"]), given["dim"]
    index = lowering.known(given["index"])
    if index is not None:
        taken = torch.gather(_numbered(source.shape), dim, index)
        return _move(lowering, source, taken.reshape(-1).tolist(), tuple(index.shape))
    if not source.shape:
        raise Unprintable("no kernel is printed for a choice among one number")
    dim %= len(source.shape)
    _check_choices(lowering, given["index"], source.shape[dim])
    return _chosen(
        lowering, _like(source, lowering.tensor(given["index"]).shape, dim), dim, lowering.tensor(given["index"])
    )


def _like(source: Value, shape: Sequence[int], dim: int) -> Value:
    """The first numbers of `source` along each dimension but `dim`, as many as `shape` has."""
    kept = tuple(size if other == dim else shape[other] for other, size in enumerate(source.shape))
    return Value(kept, source.expression)


def indexed(lowering: Lowering, node: fx.Node) -> Value:
    given = arguments_of(node)
    source, indices = lowering.tensor(given["self"]), list(given["indices"])
    known = [None if index is None else lowering.known(index) for index in indices]
    if all(index is None or value is not None for index, value in zip(indices, known, strict=True)):
        taken = torch.ops.aten.index.Tensor(_numbered(source.shape), known)
        return _move(lowering, source, taken.reshape(-1).tolist(), tuple(taken.shape))
    [dim, *others] = [dim for dim, index in enumerate(indices) if index is not None]
    index = lowering.tensor(indices[dim])
    if others or indices[dim].meta["val"].dtype == torch.bool:
        raise Unprintable("no kernel is printed for several indices that are computed, or for a mask as an index")
    _check_choices(lowering, indices[dim], source.shape[dim])
    return _chosen_block(lowering, source, dim, index)


def _chosen_block(lowering: Lowering, source: Value, dim: int, index: Value) -> Value:
    """`source` with the dimension `dim` in place of those of `index`."""
    source, index = lowering.loaded(source), lowering.loaded(index)
    before, after = source.shape[:dim], source.shape[dim + 1 :]
    size, wide = source.shape[dim], len(index.shape)

    def of_index(view: View) -> View:
        return View(view.buffer, (*(0 for _ in before), *view.strides, *(0 for _ in after)), view.offset)

    def at(place: int) -> Expression:
        def change(view: View) -> View:
            strides = (*view.strides[:dim], *(0 for _ in range(wide)), *view.strides[dim + 1 :])
            return View(view.buffer, strides, view.offset + place * view.strides[dim])

        return map_views(source.expression, change)

    position = map_views(index.expression, of_index)
    result = at(0)
    for place in range(1, size):
        result = Apply("where", (_is_at(position, place, size), at(place), result))
    return Value((*before, *index.shape, *after), result)


def scattered(value: str, adds: bool = False) -> Callable[[Lowering, fx.Node], Value]:
    """Of `scatter` and `scatter_add`; `value` is the argument that is written: a tensor, or a number."""

    def build(lowering: Lowering, node: fx.Node) -> Value:
        given = arguments_of(node)
        base, dim, index = lowering.tensor(given["self"]), given["dim"], lowering.known(given["index"])
        shape = tuple(given["index"].meta["val"].shape)
        source = lowering.tensor(given[value])
        source = Value(shape, source.expression)  # the first numbers along each dimension, or one number
        if index is not None:
            numbered = _numbered(base.shape)
            into = torch.gather(numbered, dim, index).reshape(-1).tolist()
            return _written(lowering, base, source, into, adds)
        if not base.shape:
            raise Unprintable("no kernel is printed for a choice among one number")
        dim %= len(base.shape)
        if any(size != base.shape[other] for other, size in enumerate(shape) if other != dim):
            raise Unprintable("no kernel is printed for a scatter over a part of a tensor")
        _check_choices(lowering, given["index"], base.shape[dim])
        return _chosen_places(lowering, base, dim, lowering.tensor(given["index"]), source, adds)

    return build


def put(lowering: Lowering, node: fx.Node) -> Value:
    """`index_put`, at places that are constants."""
    given = arguments_of(node)
    base, indices = lowering.tensor(given["self"]), list(given["indices"])
    known = [None if index is None else lowering.known(index) for index in indices]
    if any(index is not None and value is None for index, value in zip(indices, known, strict=True)):
        return _put_in_one(lowering, node, base, indices)
    into = torch.ops.aten.index.Tensor(_numbered(base.shape), known)
    shape = tuple(into.shape)
    values = lowering.tensor(given["values"])
    source = Value(shape, lowering.broadcast(values, shape))
    return _written(lowering, base, source, into.reshape(-1).tolist(), bool(given["accumulate"]))


def _put_in_one(lowering: Lowering, node: fx.Node, base: Value, indices: Sequence[fx.Node | None]) -> Value:
    """With one index that is computed, a vector or a number of its own."""
    given = arguments_of(node)
    [dim, *others] = [dim for dim, index in enumerate(indices) if index is not None]
    index_node = indices[dim]
    assert index_node is not None
    index = lowering.loaded(lowering.tensor(index_node))
    if others or index_node.meta["val"].dtype == torch.bool or len(index.shape) > 1:
        raise Unprintable("no kernel is printed for several indices that are computed, or for a mask as an index")
    _check_choices(lowering, index_node, base.shape[dim])
    count = index.shape[0] if index.shape else 1
    shape = (*base.shape[:dim], *index.shape, *base.shape[dim + 1 :])
    source = Value(shape, lowering.broadcast(lowering.tensor(given["values"]), shape))
    before, after = (0,) * dim, (0,) * (len(base.shape) - dim - 1)
    full = (*base.shape[:dim], count, *base.shape[dim + 1 :])

    def of_index(view: View) -> View:
        return View(view.buffer, (*before, *(view.strides or (0,)), *after), view.offset)

    def of_source(view: View) -> View:
        return view if index.shape else View(view.buffer, (*view.strides[:dim], 0, *view.strides[dim:]), view.offset)

    source = lowering.loaded(source)
    spread = Value(full, map_views(source.expression, of_source))
    position = Value(full, map_views(index.expression, of_index))
    return _chosen_places(lowering, base, dim, position, spread, bool(given["accumulate"]))
