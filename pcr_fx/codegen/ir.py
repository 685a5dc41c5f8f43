"""The small language that kernels are printed from: loops over small dense tensors of one sample.

Every tensor is a contiguous buffer of numbers of one dtype; truth values are 0 and 1. A statement computes one buffer
(or a part of it) elementwise from others, reading each through a view: strides and an offset over the statement's own
index space. So contractions, broadcasts, reductions, transposes and slices are all the same statement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pcr_fx.codegen.functions import REDUCTIONS, Reduction
from pcr_fx.errors import UnsupportedError


@dataclass(frozen=True)
class Buffer:
    """A tensor in memory.

    Attributes:
        name: unique in its function.
        size: how many numbers.
        varying: whether each sample has its own; if not, all samples read one.
        values: the numbers of a constant.
    """

    name: str
    size: int
    varying: bool
    values: tuple[float, ...] | None = None


@dataclass(frozen=True)
class View:
    """The element of `buffer` at `offset + sum(index * stride)`, for each index of a space."""

    buffer: Buffer
    strides: tuple[int, ...]
    offset: int = 0


@dataclass(frozen=True)
class Load:
    view: View


@dataclass(frozen=True)
class Constant:
    value: float

    def __post_init__(self) -> None:
        assert type(self.value) is float, "printers write it as it prints itself"


@dataclass(frozen=True)
class Apply:
    """A scalar function of scalars; `function` is the name of one of `FUNCTIONS`."""

    function: str
    arguments: tuple[Expression, ...]


Expression = Load | Constant | Apply


@dataclass(frozen=True)
class Loop:
    """`out[i] = combine over r of value[i, r]`, for all i in `shape` and r in `reduced`.

    Attributes:
        out: where to, over the indices of `shape` only.
        combine: of `REDUCTIONS`; `None` where nothing is reduced.
    """

    out: View
    shape: tuple[int, ...]
    value: Expression
    reduced: tuple[int, ...] = ()
    combine: str | None = None

    @property
    def reduction(self) -> Reduction:
        """How a loop that reduces combines."""
        assert self.combine is not None, "nothing is reduced"
        return REDUCTIONS[self.combine]


@dataclass(frozen=True)
class Function:
    """A body, or its derivative, for one sample.

    Attributes:
        inputs: in the order of the traced graph's inputs.
        outputs: in the order of its results. One that is not varying is a sum over samples, which loops add to.
        loops: run in order.
    """

    inputs: tuple[Buffer, ...]
    outputs: tuple[Buffer, ...]
    loops: tuple[Loop, ...]

    @property
    def locals(self) -> list[Buffer]:
        """Buffers that only live during a call, in the order in which they are written."""
        known = {buffer.name for buffer in (*self.inputs, *self.outputs)}
        return list(dict.fromkeys(loop.out.buffer for loop in self.loops if loop.out.buffer.name not in known))

    @property
    def constants(self) -> list[Buffer]:
        found = (view.buffer for loop in self.loops for view in views(loop.value))
        return list(dict.fromkeys(buffer for buffer in found if buffer.values is not None))

    @property
    def memory(self) -> int:
        """Numbers that a call holds beside its inputs and outputs: its locals, and the factors of one matrix."""
        factors = (sum(loop.shape[-2:]) for loop in self.loops)
        return sum(buffer.size for buffer in self.locals) + max(factors, default=0)

    @property
    def operations(self) -> int:
        """Scalar operations per sample: the cost of a call, roughly."""
        return sum(math.prod((*loop.shape, *loop.reduced)) * (1 + count(loop.value)) for loop in self.loops)


def places(view: View, shape: Sequence[int]) -> np.ndarray:
    """Where in its buffer a view is, for every index of `shape`."""
    place = np.asarray(view.offset)
    for size, stride in zip(shape, view.strides, strict=True):
        place = place[..., None] + stride * np.arange(size)
    return place


def views(value: Expression) -> Iterator[View]:
    """The views that an expression reads."""
    if isinstance(value, Load):
        yield value.view
    elif isinstance(value, Apply):
        for argument in value.arguments:
            yield from views(argument)


def count(value: Expression) -> int:
    """How many functions an expression applies."""
    return 1 + sum(map(count, value.arguments)) if isinstance(value, Apply) else 0


def map_views(value: Expression, change: Callable[[View], View]) -> Expression:
    """The expression with every view changed."""
    if isinstance(value, Load):
        return Load(change(value.view))
    if isinstance(value, Apply):
        return Apply(value.function, tuple(map_views(argument, change) for argument in value.arguments))
    return value


def simplify(loop: Loop) -> Loop:
    """The loop with as few dimensions as its views allow: none of size 1, neighbours joined where memory is."""
    rank = len(loop.shape)
    sizes = [*loop.shape, *loop.reduced]
    out = replace(loop.out, strides=(*loop.out.strides, *(0 for _ in loop.reduced)))
    everything = [out, *views(loop.value)]
    groups: list[list[int]] = []  # dimensions that become one, outer to inner
    for dim, size in enumerate(sizes):
        if size == 1:
            continue
        last = groups[-1][-1] if groups else None
        joins = (
            last is not None
            and (last < rank) == (dim < rank)
            and all(view.strides[last] == view.strides[dim] * size for view in everything)
        )
        if joins:
            groups[-1].append(dim)
        else:
            groups.append([dim])

    def change(view: View) -> View:
        return replace(view, strides=tuple(view.strides[group[-1]] for group in groups))

    kept = [math.prod(sizes[dim] for dim in group) for group in groups]
    outer = sum(group[0] < rank for group in groups)
    out = change(out)
    return Loop(
        replace(out, strides=out.strides[:outer]),
        tuple(kept[:outer]),
        map_views(loop.value, change),
        tuple(kept[outer:]),
        loop.combine,
    )


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor of `shape` that lies in memory in order."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: an expression over its own indices, not necessarily in memory."""

    shape: tuple[int, ...]
    expression: Expression


def in_memory(buffer: Buffer, shape: tuple[int, ...]) -> Value:
    return Value(shape, Load(View(buffer, contiguous(shape))))


class Unprintable(UnsupportedError):
    """A body that no kernel can be printed for; the message names the op, or says why."""
