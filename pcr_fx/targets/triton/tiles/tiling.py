"""In which tiles the loops of a function are computed, and what of it registers hold.

This is decided before a line is printed, and not changed by printing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence

from pcr_fx.codegen.ir import Apply, Buffer, Function, Load, Loop, View, contiguous, views
from pcr_fx.codegen.simplify import with_constants
from pcr_fx.targets.triton.tiles.axes import Axes

_ITEM_BYTES = {"tl.float32": 4, "tl.float64": 8}
# Bytes of the largest tile that each warp gets, which take 16 registers of each thread; and the most warps.
_WARP_BYTES = 2048
_MAX_WARPS = 16
# Bytes of inputs that a warp may fetch before a block is computed, which take 36 registers of each thread, and as many
# again for the next block's while one is computed. If a block has more, its inputs are loaded where they are used. Warps
# beyond the first eight do not count, since more of them have fewer registers each.
_HELD = 4608
_MAX_HOLDING_WARPS = 8
# The least that `tl.dot` takes of any dimension, and the largest inner dimension that a product takes at once. Threads
# hold all of it, so longer ones go in slices of the least.
_LEAST = 16
_MOST_INNER = 32
# Neighbouring numbers that are worth reading together.
_LINE = 32


def padded(size: int) -> int:
    """The power of two that Triton gives a dimension of this size."""
    return 1 << max(size - 1, 0).bit_length()


def warps_for(tile_bytes: int) -> int:
    """Warps of a program whose largest tile has so many bytes."""
    return min(max(tile_bytes // _WARP_BYTES, 1), _MAX_WARPS)


class Tiling:
    """The tiles of one function.

    Args:
        function: what is to be printed.
        dtype: as Triton calls it.
        registers: the names of inputs that registers hold.
        sums: the names of outputs that are written where callers say, and are no tensors.
        tile_bytes: of a tile at the most.
        seeds: how many cotangents there are; 0 if the function is for one.
        seeded: the inputs that are cotangents.

    Attributes:
        loops: those that compute anything, in order.
        seeded: the buffers of which there is one for each seed.
        writers: how many loops write to a buffer.
        held: the buffers that registers hold.
        warps: of the program that runs the function.
        fetches: whether inputs are loaded before the function begins.
    """

    def __init__(
        self,
        function: Function,
        dtype: str,
        registers: Collection[str],
        sums: Collection[str],
        tile_bytes: int,
        seeds: int,
        seeded: Sequence[str],
    ) -> None:
        self.function, self.registers, self.sums, self.seeds = function, registers, sums, seeds
        item_bytes = _ITEM_BYTES[dtype]
        self._most = tile_bytes // item_bytes
        self.loops = [with_constants(loop) for loop in function.loops if math.prod(loop.shape)]
        self.seeded = self._reached(seeded)
        self.writers = Counter(loop.out.buffer.name for loop in self.loops)
        self.held = {*registers, *(loop.out.buffer.name for loop in self.loops if self._stays(loop))}
        largest = max((axes.numbers for loop in self.loops for axes in self._tiles(loop)), default=1)
        self.warps = warps_for(largest * item_bytes)
        self.fetches = self._counted() * item_bytes <= _HELD * min(self.warps, _MAX_HOLDING_WARPS)

    def _reached(self, seeded: Sequence[str]) -> set[str]:
        """Buffers of which there is one for each seed: the inputs `seeded`, what depends on them, and outputs."""
        reached = {*seeded, *(buffer.name for buffer in self.function.outputs if self.seeds)}
        for _ in self.loops:  # a buffer may be written by many
            read = ({view.buffer.name for view in views(loop.value)} & set(seeded) for loop in self.loops)
            reached |= {loop.out.buffer.name for loop, found in zip(self.loops, read, strict=True) if found}
            if reached <= set(seeded):
                break
            seeded = [*reached]
        return reached

    def is_seeded(self, loop: Loop) -> bool:
        return loop.out.buffer.name in self.seeded

    def axes(self, loop: Loop) -> Axes:
        """Of what a loop computes; of a product, its result."""
        seeds = self.seeds if self.is_seeded(loop) else 0
        most = max(self._most // max(seeds, 1), 1)
        if self.factors(loop) is not None:
            return Axes(loop.shape, None, padded(math.prod(loop.shape)), seeds=seeds)
        rows, columns = loop.shape, loop.reduced if loop.reduced else None
        if columns is None and len(rows) > 1 and loop.out.buffer.name in self.sums:
            rows, columns = rows[:-1], rows[-1:]
        height, width = padded(math.prod(rows)), padded(math.prod(columns)) if columns is not None else 1
        if loop.reduced:  # A tile has all rows if it can: what they are reduced to may then stay in registers.
            width = min(width, max(most // height, min(_LINE, most)))
        width = min(width, most)
        height = min(height, max(most // width, 1))
        return Axes(rows, columns, height, width, seeds)

    def factors(self, loop: Loop) -> tuple[View, View] | None:
        """The factors of a contraction that is a product of matrices: the one with seeds, then the one with rows."""
        value = loop.value
        if not (
            self.is_seeded(loop) and loop.combine == "add" and isinstance(value, Apply) and value.function == "mul"
        ):
            return None
        rows, columns = padded(math.prod(loop.shape)), padded(math.prod(loop.reduced))
        if min(rows, columns, self.seeds) < _LEAST or self.seeds * rows > self._most:
            return None
        found = [argument.view for argument in value.arguments if isinstance(argument, Load)]
        found.sort(key=lambda view: view.buffer.name not in self.seeded)
        if len(found) != 2 or found[0].buffer.name not in self.seeded or found[1].buffer.name in self.seeded:
            return None
        return None if any(found[0].strides[: len(loop.shape)]) else (found[0], found[1])

    def _factor_axes(self, loop: Loop) -> tuple[Axes, Axes]:
        """Of the factors `[seeds, inner]` and `[inner, rows]` of a product."""
        inner = padded(math.prod(loop.reduced))
        height = inner if inner <= _MOST_INNER else _LEAST
        left = Axes(loop.reduced, None, height, seeds=self.seeds)
        return left, Axes(loop.reduced, loop.shape, height, padded(math.prod(loop.shape)))

    def _tiles(self, loop: Loop) -> list[Axes]:
        """Every tile that a loop needs."""
        return [self.axes(loop), *(self._factor_axes(loop) if self.factors(loop) is not None else ())]

    def reads(self, loop: Loop) -> list[tuple[View, Axes]]:
        """Every view that a loop reads, and the tile that it is read into.

        Those of a product are over the indices of their tiles instead of the loop's.
        """
        factors = self.factors(loop)
        if factors is None:
            return [(view, self.axes(loop)) for view in views(loop.value)]
        rank = len(loop.shape)
        (left, right), (left_axes, right_axes) = factors, self._factor_axes(loop)
        turned = View(right.buffer, (*right.strides[rank:], *right.strides[:rank]), right.offset)
        return [(View(left.buffer, left.strides[rank:], left.offset), left_axes), (turned, right_axes)]

    def _stays(self, loop: Loop) -> bool:
        """Whether a loop's result is a tensor that stays in registers: it is all of its buffer, computed all at once."""
        out, axes = loop.out, self.axes(loop)
        is_all = out.offset == 0 and is_whole(loop.shape, out.strides, out.buffer)
        is_local = self.writers[out.buffer.name] == 1 and out.buffer.name not in self.sums
        # Slices of columns that are reduced are combined in registers, one after another.
        return is_all and is_local and not axes.slices_rows and (bool(loop.reduced) or not axes.slices_columns)

    def _counted(self) -> int:
        """How many numbers all tiles have that could be loaded before the function begins."""
        every = {}
        for loop in self.loops:
            for view, axes in self.reads(loop):
                if self.is_fetched(view, axes):
                    offsets, mask, numbers = axes.offsets(view, False)
                    every[view.buffer.name, offsets, mask] = numbers
        return sum(every.values())

    def is_fetched(self, view: View, axes: Axes) -> bool:
        """Whether a view can be loaded before the function begins: it is of an input in memory, and its tile is not sliced."""
        return view.buffer.name not in self.registers and not self.writers[view.buffer.name] and not axes.is_sliced


def is_whole(sizes: Sequence[int], strides: Sequence[int], buffer: Buffer) -> bool:
    return tuple(strides) == contiguous(sizes) and math.prod(sizes) == buffer.size
