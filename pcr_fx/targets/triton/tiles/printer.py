"""Triton from the language of kernels: each loop becomes a tile, with the indices of its output along the rows and what it
reduces along the columns.

One program works on one sample, with all its threads on one loop at a time. What a loop computes stays in registers
where later loops read it along one axis of their tiles. Else it goes through memory that no other program uses, with a
barrier between those who write and those who read. If all indices of a loop were too large a tile, it takes slices of
them in turn.

A pullback is linear in its cotangent, and can be printed for several cotangents at once, called seeds as in automatic
differentiation. Tiles of what depends on them have an axis more, and its contractions are products of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pcr_fx.codegen.ir import Apply, Buffer, Constant, Expression, Function, Load, Loop, View
from pcr_fx.targets.triton.printer import print_assignments, print_number, print_scalar
from pcr_fx.targets.triton.scalars.unroll import Assignment, Scalar
from pcr_fx.targets.triton.tiles.axes import Axes, load_at
from pcr_fx.targets.triton.tiles.tiling import Tiling, is_whole, padded


@dataclass(frozen=True)
class Fetch:
    """A tile of an input in memory, to be loaded as `name` before the lines that use it.

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
        once: lines that do not depend on the seeds, before the others.
        lines: those that compute the results.
        results: the name of each output that is no `Sum`: a tensor `[padded size]`, or `[seeds, padded size]`.
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
        seeds: how many cotangents there are; 0 if the function is for one.
        seeded: the inputs that are cotangents, of which `registers` has tensors `[seeds, padded size]`.
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
        seeds: int = 0,
        seeded: Sequence[str] = (),
    ) -> None:
        self.function, self.dtype, self.prefix = function, dtype, prefix
        self.registers, self.pointers, self.sums, self.seeds = dict(registers), dict(pointers), sums, seeds
        self.tiling = Tiling(function, dtype, registers, sums, tile_bytes, seeds, seeded)
        self.printed = Printed(warps=self.tiling.warps)
        self._dirty: set[str] = set()
        self._names = 0
        self._fetched: dict[tuple[str, str, str], str] = {}

    def run(self) -> Printed:
        self._place_in_memory()
        if self.seeds:
            self._save_inputs(seeded=False)
            for loop in self.tiling.loops:
                if not self.tiling.is_seeded(loop):
                    self._print(loop)
            self.printed.once, self.printed.lines = self.printed.lines, []
        self._save_inputs(seeded=bool(self.seeds))
        for loop in self.tiling.loops:
            if self.tiling.is_seeded(loop) or not self.seeds:
                self._print(loop)
        for buffer in self.function.outputs:
            if buffer.name not in self.sums:
                self.printed.results[buffer.name] = self._as_tensor(buffer)
        if self.printed.scratch:
            self._line("tl.debug_barrier()")  # what is printed next may write to the same memory
        return self.printed

    # --- where things are -----------------------------------------------------------------------------------

    def _from_registers(self, view: View, axes: Axes) -> str | None:
        """A view as a tensor that registers hold, broadcast over the other axes; nothing where it has to be loaded.

        Registers cannot be indexed: it has to be all of a buffer, along the rows of a tile or along its columns.
        """
        name = view.buffer.name
        if name not in self.tiling.held or view.offset:
            return None
        held = self.registers.get(name, f"{self.prefix}{name}")
        seeds = ("seed",) if name in self.tiling.seeded else ()
        rows, columns = axes.split(view)
        if not any(columns) and not axes.slices_rows and is_whole(axes.rows, rows, view.buffer):
            return axes.spread(held, *seeds, "row")
        along_columns = axes.columns is not None and not any(rows) and not axes.slices_columns
        if along_columns and is_whole(axes.columns or (), columns, view.buffer):
            return axes.spread(held, *seeds, "column")
        return axes.spread(held, *seeds, "row") if view.buffer.size == 1 else None

    def _place_in_memory(self) -> None:
        """Takes memory for what some loop cannot read from registers, and for what no register holds."""
        local = {
            buffer.name: buffer for buffer in (*self.function.inputs, *self.function.outputs, *self.function.locals)
        }
        needed = {
            view.buffer.name
            for loop in self.tiling.loops
            for view, axes in self.tiling.reads(loop)
            if view.buffer.name not in self.pointers and self._from_registers(view, axes) is None
        }
        needed |= {name for name in self.tiling.writers if name not in self.tiling.held and name not in self.sums}
        for name, buffer in local.items():
            if name in needed:
                self.pointers[name] = f"(scratch + {self.printed.scratch})"
                self.printed.scratch += buffer.size * (self.seeds if name in self.tiling.seeded else 1)

    def _save_inputs(self, seeded: bool) -> None:
        """Store what registers hold, but loops read from memory."""
        for buffer in self.function.inputs:
            name = buffer.name
            if name in self.registers and name in self.pointers and (name in self.tiling.seeded) == seeded:
                place, mask = self._whole(buffer)
                self._store(f"{self.pointers[name]} + {place}", self.registers[name], mask)
                self._dirty.add(name)

    def _whole(self, buffer: Buffer) -> tuple[str, str]:
        """Offsets and mask of all of a buffer."""
        seeded = buffer.name in self.tiling.seeded
        axes = Axes((buffer.size,), None, padded(buffer.size), seeds=self.seeds if seeded else 0)
        offsets, mask, _ = axes.offsets(View(buffer, (1,)), seeded)
        return offsets, mask

    def _as_tensor(self, buffer: Buffer) -> str:
        if buffer.name in self.tiling.held:
            return f"{self.prefix}{buffer.name}"
        name = self._name()
        if not self.tiling.writers[buffer.name]:  # it has no numbers
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
        axes, out = self.tiling.axes(loop), loop.out.buffer.name
        read = {view.buffer.name for view, tile in self.tiling.reads(loop) if self._from_registers(view, tile) is None}
        self._wait(read | {out})
        depth = 0
        if axes.slices_rows:
            self._line(f"for row in range(0, {math.prod(axes.rows)}, {axes.height}):")
            depth += 1
        if self.tiling.factors(loop) is not None:
            value = self._product(loop)
        else:
            value = self._reduced(loop, axes, depth) if loop.reduced else self._unreduced(loop, axes, depth)
        if out in self.tiling.held:
            self._line(f"{self.prefix}{out} = {value}", depth)
        if out in self.sums or out in self.pointers:
            self._write(loop, axes, value, depth)

    def _unreduced(self, loop: Loop, axes: Axes, depth: int) -> str:
        if axes.slices_columns:
            self._line(f"for column_ in range(0, {math.prod(axes.columns or ())}, {axes.width}):", depth)
        return self._tile(loop.value, axes, depth + axes.slices_columns)

    def _product(self, loop: Loop) -> str:
        """A contraction by `tl.dot`, in slices of what is summed over."""
        (left, left_axes), (right, right_axes) = self.tiling.reads(loop)
        total, depth = self._name(), int(left_axes.slices_rows)
        self._line(f"{total} = tl.zeros({self.tiling.axes(loop).shape}, {self.dtype})")
        if left_axes.slices_rows:
            self._line(f"for row in range(0, {math.prod(left_axes.rows)}, {left_axes.height}):")
        factors = []
        for view, axes in ((left, left_axes), (right, right_axes)):
            name, value = self._name(), f"tl.broadcast_to({self._read(view, axes, depth)}, {axes.shape})"
            # Rows past the end of a tensor may hold anything, and would be summed.
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
        value = loop.reduction.triton.format(value, 2 if axes.seeds else 1)
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
        (line,) = print_assignments([Assignment(name, value.function, arguments)], self.dtype)
        self._line(line, depth)
        return name

    def _read(self, view: View, axes: Axes, depth: int) -> str:
        held = self._from_registers(view, axes)
        if held is not None:
            return held
        buffer = view.buffer.name
        offsets, mask, numbers = axes.offsets(view, buffer in self.tiling.seeded)
        if not (self.tiling.fetches and self.tiling.is_fetched(view, axes)):
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
        offsets, mask, _ = along.offsets(view, out in self.tiling.seeded)
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
