"""Triton from the language of kernels: each loop a tile, the indices of its output along one axis, what is reduced along
the other.

One program works on one sample, all its threads on one loop at a time. What a loop computes stays in registers where
later loops read it along one of their axes; else it goes through memory that no other program touches, with a barrier
between those who write and those who read. A tile that is too large is gone through in slices.

What is linear in some input, such as a pullback in its cotangent, can be printed for several of them at once: tiles then
have an axis more, and contractions are products of matrices.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pcr_fx.codegen.ir import Apply, Buffer, Constant, Expression, Function, Load, Loop, View, contiguous, views
from pcr_fx.codegen.simplify import with_constants
from pcr_fx.targets.triton.printer import print_assignments, print_number, print_scalar
from pcr_fx.targets.triton.scalars.unroll import Assignment, Scalar
from pcr_fx.targets.triton.tiles.axes import Axes, load_at

_ITEM_BYTES = {"tl.float32": 4, "tl.float64": 8}
# Bytes of the largest tile in each warp, which is 16 registers of each thread; and warps at the most.
_WARP_BYTES = 2048
_MAX_WARPS = 16
# Bytes of inputs that a warp may hold all along, 36 registers of each thread: twice as many in all where those of the
# next block are fetched while one is computed. Where there would be more, they are loaded where they are used. Threads of
# more than eight warps have fewer registers.
_HELD = 4608
_MAX_HOLDING_WARPS = 8
# The least that `tl.dot` takes of any dimension, and the inner dimension from which on products go in slices of that:
# a thread holds all of it at once.
_LEAST = 16
_MOST_INNER = 32
# Numbers that are worth reading together.
_LINE = 32


def padded(size: int) -> int:
    """The power of two that Triton gives a dimension of this size."""
    return 1 << max(size - 1, 0).bit_length()


def warps_for(tile_bytes: int) -> int:
    """Warps of a program whose largest tile has so many bytes."""
    return min(max(tile_bytes // _WARP_BYTES, 1), _MAX_WARPS)


@dataclass(frozen=True)
class Fetch:
    """A tile of an input that lies in memory: to be loaded, as `name`, before the lines that use it.

    Attributes:
        pointer: where the input begins, as the printer was told.
        numbers: how many, padding included.
    """

    name: str
    pointer: str
    offsets: str
    mask: str
    numbers: int

    def load(self, pointer: str) -> str:
        """The expression that loads it of an input that begins at `pointer`."""
        return load_at(pointer, self.offsets, self.mask)


@dataclass(frozen=True)
class Sum:
    """An output that is written where `pointer` says, or added to what is there unless `first`, if that is given."""

    pointer: str
    first: str | None = None


@dataclass
class Printed:
    """A function as lines of Triton.

    Attributes:
        fetches: what has to be loaded before.
        once: what does not depend on which lanes there are; before the lines.
        lines: what computes the results.
        results: the name of each output that is no `Sum`: a tensor `[padded size]`, or `[lanes, padded size]`.
        scratch: how many numbers of memory the lines use, from the pointer `scratch` on.
        warps: of the program that runs them.
    """

    fetches: list[Fetch] = field(default_factory=list)
    once: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    results: dict[str, str] = field(default_factory=dict)
    scratch: int = 0
    warps: int = 1


class TilePrinter:
    """Prints one function.

    Args:
        function: what to print.
        dtype: as Triton calls it.
        registers: by name, the tensors `[padded size]` that hold inputs. What lies past an input's end is not read.
        pointers: by name, where the other inputs and the constants begin.
        sums: by name, what becomes of outputs that are not to be tensors.
        prefix: of all names that the lines give.
        tile_bytes: of a tile at the most.
        lanes: how many of each input in `batched` there are, `[lanes, padded size]`; none if 0.
        batched: which inputs those are.
    """

    def __init__(
        self,
        function: Function,
        dtype: str,
        registers: Mapping[str, str],
        pointers: Mapping[str, str],
        sums: Mapping[str, Sum],
        prefix: str,
        tile_bytes: int,
        lanes: int = 0,
        batched: Sequence[str] = (),
    ) -> None:
        self.function, self.dtype, self.prefix = function, dtype, prefix
        self._item_bytes = _ITEM_BYTES[dtype]
        self._most = tile_bytes // self._item_bytes
        self.registers, self.pointers, self.sums = dict(registers), dict(pointers), sums
        self.loops = [with_constants(loop) for loop in function.loops if math.prod(loop.shape)]
        self.lanes = lanes
        self._batched = self._reached(batched)
        self._writers = Counter(loop.out.buffer.name for loop in self.loops)
        self._held = {*registers, *(loop.out.buffer.name for loop in self.loops if self._stays(loop))}
        largest = max((axes.numbers for loop in self.loops for axes in self._tiles(loop)), default=1)
        self.printed = Printed(warps=warps_for(largest * self._item_bytes))
        self._fetches = self._counted() * self._item_bytes <= _HELD * min(self.printed.warps, _MAX_HOLDING_WARPS)
        self._dirty: set[str] = set()
        self._names = 0
        self._fetched: dict[tuple[str, str, str], str] = {}

    def run(self) -> Printed:
        self._place_in_memory()
        if self.lanes:
            self._save_inputs(batched=False)
            for loop in self.loops:
                if not self._is_batched(loop):
                    self._print(loop)
            self.printed.once, self.printed.lines = self.printed.lines, []
        self._save_inputs(batched=bool(self.lanes))
        for loop in self.loops:
            if self._is_batched(loop) or not self.lanes:
                self._print(loop)
        for buffer in self.function.outputs:
            if buffer.name not in self.sums:
                self.printed.results[buffer.name] = self._as_tensor(buffer)
        if self.printed.scratch:
            self._line("tl.debug_barrier()")  # What comes next may write to the same memory.
        return self.printed

    # --- where things are -----------------------------------------------------------------------------------

    def _reached(self, batched: Sequence[str]) -> set[str]:
        """The buffers that each lane has for itself: all outputs, and what is computed from inputs that it has so."""
        reached = {*batched, *(buffer.name for buffer in self.function.outputs if self.lanes)}
        for loop in self.loops:
            if any(view.buffer.name in reached for view in views(loop.value)):
                reached.add(loop.out.buffer.name)
        return reached

    def _is_batched(self, loop: Loop) -> bool:
        return loop.out.buffer.name in self._batched

    def _axes(self, loop: Loop) -> Axes:
        """How what a loop computes lies in a tile; of a product of matrices it is the result that does."""
        lanes = self.lanes if self._is_batched(loop) else 0
        most = max(self._most // max(lanes, 1), 1)
        if self._factors(loop) is not None:
            return Axes(loop.shape, None, padded(math.prod(loop.shape)), lanes=lanes)
        rows, columns = loop.shape, loop.reduced if loop.reduced else None
        if columns is None and len(rows) > 1 and loop.out.buffer.name in self.sums:
            rows, columns = rows[:-1], rows[-1:]
        height, width = padded(math.prod(rows)), padded(math.prod(columns)) if columns is not None else 1
        if loop.reduced:  # A tile has all rows if it can: what they are reduced to may then stay in registers.
            width = min(width, max(most // height, min(_LINE, most)))
        width = min(width, most)
        height = min(height, max(most // width, 1))
        return Axes(rows, columns, height, width, lanes)

    def _factors(self, loop: Loop) -> tuple[View, View] | None:
        """The factors of a loop that is a product of matrices, `result[lane, row] = sum over i of a[lane, i] * b[i, row]`.

        So each lane has an `a` for itself, which is the same for all rows, and all lanes have the same `b`.
        """
        value = loop.value
        if not (
            self._is_batched(loop) and loop.combine == "add" and isinstance(value, Apply) and value.function == "mul"
        ):
            return None
        rows, inner = padded(math.prod(loop.shape)), padded(math.prod(loop.reduced))
        if min(rows, inner, self.lanes) < _LEAST or self.lanes * rows > self._most:
            return None
        factors = [argument.view for argument in value.arguments if isinstance(argument, Load)]
        own = [view for view in factors if view.buffer.name in self._batched]
        common = [view for view in factors if view.buffer.name not in self._batched]
        if len(own) != 1 or len(common) != 1 or any(own[0].strides[: len(loop.shape)]):
            return None
        return own[0], common[0]

    def _factor_axes(self, loop: Loop) -> tuple[Axes, Axes]:
        """How the factors `[lanes, inner]` and `[inner, rows]` of a product lie in tiles: in slices of the inner axis."""
        inner = padded(math.prod(loop.reduced))
        height = inner if inner <= _MOST_INNER else _LEAST
        left = Axes(loop.reduced, None, height, lanes=self.lanes)
        return left, Axes(loop.reduced, loop.shape, height, padded(math.prod(loop.shape)))

    def _tiles(self, loop: Loop) -> list[Axes]:
        """Every tile that a loop needs."""
        return [self._axes(loop), *(self._factor_axes(loop) if self._factors(loop) is not None else ())]

    def _reads(self, loop: Loop) -> list[tuple[View, Axes]]:
        """Every view that a loop reads, and the tile that it is read into.

        Those of a product are over the indices of their tiles instead of the loop's.
        """
        factors = self._factors(loop)
        if factors is None:
            return [(view, self._axes(loop)) for view in views(loop.value)]
        rank = len(loop.shape)
        (left, right), (left_axes, right_axes) = factors, self._factor_axes(loop)
        turned = View(right.buffer, (*right.strides[rank:], *right.strides[:rank]), right.offset)
        return [(View(left.buffer, left.strides[rank:], left.offset), left_axes), (turned, right_axes)]

    def _stays(self, loop: Loop) -> bool:
        """Whether a loop's result is a tensor that stays in registers: it is all of its buffer, computed all at once."""
        out, axes = loop.out, self._axes(loop)
        is_whole = out.offset == 0 and _is_whole(loop.shape, out.strides, out.buffer)
        is_local = self._writers[out.buffer.name] == 1 and out.buffer.name not in self.sums
        # Slices of columns that are reduced are combined in registers, one after another.
        return is_whole and is_local and not axes.slices_rows and (bool(loop.reduced) or not axes.slices_columns)

    def _from_registers(self, view: View, axes: Axes) -> str | None:
        """A view as a tensor that registers hold, broadcast over the other axes; nothing where it has to be loaded.

        Registers cannot be indexed: it has to be all of a buffer, along the rows of a tile or along its columns.
        """
        name = view.buffer.name
        if name not in self._held or view.offset:
            return None
        held = self.registers.get(name, f"{self.prefix}{name}")
        lanes = ("lane",) if name in self._batched else ()
        rows, columns = axes.split(view)
        if not any(columns) and not axes.slices_rows and _is_whole(axes.rows, rows, view.buffer):
            return axes.spread(held, *lanes, "row")
        along_columns = axes.columns is not None and not any(rows) and not axes.slices_columns
        if along_columns and _is_whole(axes.columns or (), columns, view.buffer):
            return axes.spread(held, *lanes, "column")
        return axes.spread(held, *lanes, "row") if view.buffer.size == 1 else None

    def _place_in_memory(self) -> None:
        """Takes memory for what some loop cannot read from registers, and for what no register holds."""
        local = {
            buffer.name: buffer for buffer in (*self.function.inputs, *self.function.outputs, *self.function.locals)
        }
        needed = {
            view.buffer.name
            for loop in self.loops
            for view, axes in self._reads(loop)
            if view.buffer.name not in self.pointers and self._from_registers(view, axes) is None
        }
        needed |= {name for name in self._writers if name not in self._held and name not in self.sums}
        for name, buffer in local.items():
            if name in needed:
                self.pointers[name] = f"(scratch + {self.printed.scratch})"
                self.printed.scratch += buffer.size * (self.lanes if name in self._batched else 1)

    def _save_inputs(self, batched: bool) -> None:
        """Stores inputs that registers hold, but that some loop reads from memory."""
        for buffer in self.function.inputs:
            name = buffer.name
            if name in self.registers and name in self.pointers and (name in self._batched) == batched:
                place, mask = self._whole(buffer)
                self._store(f"{self.pointers[name]} + {place}", self.registers[name], mask)
                self._dirty.add(name)

    def _whole(self, buffer: Buffer) -> tuple[str, str]:
        """Offsets and mask of all of a buffer."""
        batched = buffer.name in self._batched
        axes = Axes((buffer.size,), None, padded(buffer.size), lanes=self.lanes if batched else 0)
        offsets, mask, _ = axes.offsets(View(buffer, (1,)), batched)
        return offsets, mask

    def _counted(self) -> int:
        """How many numbers all tiles have that could be loaded before the function begins."""
        every = {}
        for loop in self.loops:
            for view, axes in self._reads(loop):
                if self._is_fetched(view, axes):
                    offsets, mask, numbers = axes.offsets(view, False)
                    every[view.buffer.name, offsets, mask] = numbers
        return sum(every.values())

    def _is_fetched(self, view: View, axes: Axes) -> bool:
        """Whether a view can be loaded before the function begins: it is of an input in memory, and its tile is not sliced."""
        return view.buffer.name not in self.registers and not self._writers[view.buffer.name] and not axes.is_sliced

    def _as_tensor(self, buffer: Buffer) -> str:
        if buffer.name in self._held:
            return f"{self.prefix}{buffer.name}"
        name = self._name()
        if not self._writers[buffer.name]:  # it has no numbers
            self._line(f"{name} = tl.zeros([{padded(buffer.size)}], {self.dtype})")
            return name
        self._wait({buffer.name})
        self._line(f"{name} = {load_at(self.pointers[buffer.name], *self._whole(buffer))}")
        return name

    # --- lines ----------------------------------------------------------------------------------------------

    def _name(self) -> str:
        self._names += 1
        return f"{self.prefix}{self._names}"

    def _line(self, text: str, depth: int = 0) -> None:
        self.printed.lines.append("    " * depth + text)

    def _store(self, place: str, value: str, mask: str, depth: int = 0) -> None:
        self._line(f"tl.store({place}, {value}{f', mask={mask}' if mask else ''})", depth)

    def _wait(self, names: set[str]) -> None:
        if self._dirty & names:
            self._line("tl.debug_barrier()")
            self._dirty.clear()

    def _print(self, loop: Loop) -> None:
        axes, out = self._axes(loop), loop.out.buffer.name
        read = {view.buffer.name for view, tile in self._reads(loop) if self._from_registers(view, tile) is None}
        self._wait(read | {out})
        depth = 0
        if axes.slices_rows:
            self._line(f"for row in range(0, {math.prod(axes.rows)}, {axes.height}):")
            depth += 1
        if self._factors(loop) is not None:
            value = self._product(loop)
        else:
            value = self._reduced(loop, axes, depth) if loop.reduced else self._unreduced(loop, axes, depth)
        if out in self._held:
            self._line(f"{self.prefix}{out} = {value}", depth)
        if out in self.sums or out in self.pointers:
            self._write(loop, axes, value, depth)

    def _unreduced(self, loop: Loop, axes: Axes, depth: int) -> str:
        if axes.slices_columns:
            self._line(f"for column_ in range(0, {math.prod(axes.columns or ())}, {axes.width}):", depth)
        return self._tile(loop.value, axes, depth + axes.slices_columns)

    def _product(self, loop: Loop) -> str:
        """A contraction by `tl.dot`, in slices of what is summed over."""
        (left, left_axes), (right, right_axes) = self._reads(loop)
        total, depth = self._name(), int(left_axes.slices_rows)
        self._line(f"{total} = tl.zeros({self._axes(loop).shape}, {self.dtype})")
        if left_axes.slices_rows:
            self._line(f"for row in range(0, {math.prod(left_axes.rows)}, {left_axes.height}):")
        factors = []
        for view, axes in ((left, left_axes), (right, right_axes)):
            name, value = self._name(), f"tl.broadcast_to({self._read(view, axes, depth)}, {axes.shape})"
            # What lies past the end of a tensor may be anything.
            self._line(f"{name} = {f'tl.where({axes.masks[0]}, {value}, 0)' if axes.masks[0] else value}", depth)
            factors.append(name)
        options = f'input_precision="ieee", out_dtype={self.dtype}'
        self._line(f"{total} = tl.dot({factors[0]}, {factors[1]}, {total}, {options})", depth)
        return total

    def _reduced(self, loop: Loop, axes: Axes, depth: int) -> str:
        """What a loop computes of each row."""
        start, total, along = print_number(float(loop.reduction.start)), self._name(), replace(axes, columns=None)
        if axes.slices_columns:
            self._line(f"{total} = tl.full({along.shape}, {start}, {self.dtype})", depth)
            self._line(f"for column_ in range(0, {math.prod(axes.columns or ())}, {axes.width}):", depth)
        inner = depth + axes.slices_columns
        value = self._tile(loop.value, axes, inner)
        if axes.masks[1]:
            value = f"tl.where({axes.masks[1]}, {value}, {start})"
        value = loop.reduction.triton.format(value, 2 if axes.lanes else 1)
        if axes.slices_columns:
            part = self._name()
            self._line(f"{part} = {value}", inner)
            (line,) = print_assignments([Assignment(total, loop.reduction.function.name, (total, part))], self.dtype)
            self._line(line, inner)
        else:
            self._line(f"{total} = {value}", depth)
        return total

    def _tile(self, value: Expression, axes: Axes, depth: int) -> str:
        """The name of an expression, over all of a tile."""
        result, name = self._evaluate(value, axes, depth), self._name()
        text = print_scalar(result, self.dtype)
        self._line(f"{name} = tl.broadcast_to({text}, {axes.shape})", depth)
        return name

    def _evaluate(self, value: Expression, axes: Axes, depth: int) -> Scalar:
        if isinstance(value, Constant):
            return value.value
        if isinstance(value, Load):
            return self._read(value.view, axes, depth)
        assert isinstance(value, Apply)
        arguments = tuple(self._evaluate(argument, axes, depth) for argument in value.arguments)
        name = self._name()
        # Functions without any tensor among their arguments would have no shape to compute in.
        (line,) = print_assignments([Assignment(name, value.function, arguments)], self.dtype)
        self._line(line, depth)
        return name

    def _read(self, view: View, axes: Axes, depth: int) -> str:
        held = self._from_registers(view, axes)
        if held is not None:
            return held
        buffer = view.buffer.name
        offsets, mask, numbers = axes.offsets(view, buffer in self._batched)
        if not (self._fetches and self._is_fetched(view, axes)):
            name = self._name()
            self._line(f"{name} = {load_at(self.pointers[buffer], offsets, mask)}", depth)
            return name
        key = buffer, offsets, mask
        if key not in self._fetched:
            self._fetched[key] = f"{self.prefix}f{len(self._fetched)}"
            self.printed.fetches.append(Fetch(self._fetched[key], self.pointers[buffer], offsets, mask, numbers))
        return self._fetched[key]

    def _write(self, loop: Loop, axes: Axes, value: str, depth: int) -> None:
        out = loop.out.buffer.name
        depth += axes.slices_columns and not loop.reduced
        along = axes if not loop.reduced else replace(axes, columns=None)
        view = loop.out
        if not along.rows:  # one number: an axis of one row
            along, view = replace(along, rows=(1,)), View(view.buffer, (1, *view.strides), view.offset)
        offsets, mask, _ = along.offsets(view, out in self._batched)
        add = self.sums.get(out)
        if add is None:
            self._store(f"{self.pointers[out]} + {offsets}", value, mask, depth)
            self._dirty.add(out)
            return
        place = f"{add.pointer} + {offsets}"
        if add.first is None:
            self._store(place, value, mask, depth)
            return
        self._line(f"if {add.first}:", depth)
        self._store(place, value, mask, depth + 1)
        self._line("else:", depth)
        self._store(place, f"{load_at(add.pointer, offsets, mask)} + {value}", mask, depth + 1)


def _is_whole(sizes: Sequence[int], strides: Sequence[int], buffer: Buffer) -> bool:
    return tuple(strides) == contiguous(sizes) and math.prod(sizes) == buffer.size
