"""The Triton source of a chain block by block, with a sample in each lane; operands are read where they lie."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pcr_fx.stopping import Outcome
from pcr_fx.targets.triton.assignments import Scalar
from pcr_fx.targets.triton.printer import print_assignments, print_scalar
from pcr_fx.targets.triton.scalars.source import ScalarSource
from pcr_fx.targets.triton.scalars.unroll import Scalars
from pcr_fx.targets.triton.source import indent

# With `skip_solved`, samples that Newton's method solved, as `stats` tells, are left as they are.
#
# A turn of the loop computes two halves of a few columns each. Each half has names for what it reads, and so registers:
# the reads of one half are under way while the other is computed, and no register has to be copied to another.
_SEQUENTIAL = """
@triton.jit(do_not_specialize=["length", "samples", "skip_solved"])
def sequential({parameters}, stats, length, samples, skip_solved, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wanted = sample < samples
    if skip_solved:
        wanted = wanted & (tl.load(stats + sample * 3, mask=wanted, other=0) > {rounding})
    columns = length + {extra}
    end = tl.where(wanted, columns, 0)
    # Lanes past the last sample read that one, so that reads need no mask.
    sample = tl.minimum(sample, samples - 1)
    if tl.max(end, 0) > 0:
{start}
{prefetch}
        for column in range(0, columns, {turn}):
{halves}
"""
# Registers of 32 bits for numbers whose reads are under way, and lines of a turn: with more of either, compiling takes
# many seconds.
_FETCHED_REGISTERS = 88
_LINES = 256
# The most numbers that an instruction reads or writes, by the bytes of one.
_AT_ONCE = {4: 4, 8: 2}


@dataclass(frozen=True)
class SequentialSource(ScalarSource):
    """A chain block by block."""

    def text(self, direction: str) -> str:
        backward = direction == "adjoint"
        half = self._columns_a_half(backward)
        names = [*(one.name for one in self.inputs), "initial", "trajectory", "cotangents", "result"]
        return _SEQUENTIAL.format(
            parameters=", ".join(names),
            extra=int(backward),
            rounding=Outcome.ROUNDING.number,
            start=indent(self._started(backward), 2),
            prefetch=indent([line for u in range(2 * half) for line in self._fetched(u, str(u), backward)], 2),
            turn=2 * half,
            halves=indent([*self._half(0, half, backward), *self._half(half, half, backward)], 3),
        )

    def _columns_a_half(self, backward: bool) -> int:
        lines = self._column(0, backward)
        registers = len(set(re.findall(r"\bc0_\w+", "\n".join(lines)))) * self.program.dtype.itemsize // 4
        fits = (
            half for half in (4, 2) if 2 * half * registers <= _FETCHED_REGISTERS and 2 * half * len(lines) <= _LINES
        )
        return next(fits, 1)

    def _started(self, backward: bool) -> list[str]:
        """Reads the state before the first column, and what all blocks share."""
        d = self.dimension
        initial = self._read([f"initial{i}" for i in range(d)], f"initial + sample * {d}")
        start = [f"x{i} = {self.zeros if backward else f'initial{i}'}" for i in range(d)]
        shared = [
            f"{one.name}_{e} = tl.load({one.name} + {'sample * ' + str(one.size) + ' + ' if one.own else ''}{e})"
            for one in self.inputs
            if one.shared
            for e in range(one.size)
        ]
        return [*initial, *start, *shared]

    def _half(self, first: int, half: int, backward: bool) -> list[str]:
        """Columns `first` and on of a turn, and among them the reads for the other half.

        Those are issued as soon as the first number of this half is used, neither sooner nor later. Before a branch, such
        as the end of a turn, a compiler waits for all reads under way: sooner, it would wait for those of both halves. Later,
        there would be less to compute until they are needed, which hides how long they take. A compiler would move them
        later by itself, since nothing needs them before the next turn. So they are put into a branch, and the state into
        what the branch computes: it stays what it is, as `samples > 0` always holds, but a compiler does not know.
        """
        lines = [line for u in range(first, first + half) for line in self._column(u, backward)]
        use = next((at for at, line in enumerate(lines) if f"c{first}_" in line), None)
        if use is None:  # nothing is read
            return lines
        number, _ = lines[use].split(" = ", 1)
        after = range(first + half, first + 2 * half)
        fetch = [line for u in after for line in self._fetched(u % (2 * half), f"column + {u}", backward)]
        fetch += [f"x{i} = tl.where(samples > 0, x{i}, {number})" for i in range(self.dimension)]
        return [*lines[: use + 1], f"if column + {first + half} < columns:", indent(fetch, 1), *lines[use + 1 :]]

    def _column(self, u: int, backward: bool) -> list[str]:
        """Column `u` of a turn.

        A turn may go on past the last column. Nothing is stored there, and the state that it leaves is read by none.
        """
        prefix, d, scalars = f"c{u}_", range(self.dimension), Scalars(f"s{u}_")
        state: list[Scalar] = [f"x{i}" for i in d]
        inputs = self._lane_inputs(prefix)
        if backward:
            (result,) = scalars.run(self.body.pull, [[f"{prefix}z{i}" for i in d], *inputs, state])
            # The first column has no block: it is the last cotangent (see below, where `u` is 0).
            result = [scalars.apply("add", f"{prefix}g{i}", value) for i, value in zip(d, result, strict=True)]
        else:
            (result,) = scalars.run(self.body.step, [state, *inputs])
        row = f"length - column - {u}" if backward else f"column + {u}"
        before = [
            f"{prefix}z{i} = tl.where({self._block(f'column + {u}', True)} > 0, {prefix}z{i}, initial{i})"
            for i in d
            if backward
        ]
        return [
            *before,
            *print_assignments(scalars.assignments, self.real),
            *(f"v{i} = tl.broadcast_to({print_scalar(value, self.real)}, [BLOCK])" for i, value in enumerate(result)),
            *(f"v{i} = tl.where(column > 0, v{i}, {prefix}g{i})" for i in d if backward and u == 0),
            *(f"x{i} = v{i}" for i in d),
            *self._written(
                f"result + {self._row(row)} * {self.dimension}", [f"x{i}" for i in d], f"column + {u} < end"
            ),
        ]

    def _lane_inputs(self, prefix: str) -> list[list[Scalar]]:
        return [
            [f"{one.name}_{e}" if one.shared else f"{prefix}{one.name}_{e}" for e in range(one.size)]
            for one in self.inputs
        ]

    def _row(self, index: str) -> str:
        """The row of each sample's numbers, in what has a row for each block or column and sample."""
        return f"(tl.cast({index}, tl.int64) * samples + sample)"

    def _block(self, column: str, backward: bool) -> str:
        """The block of a column; for columns that have none, a block that may be read."""
        if backward:
            return f"tl.maximum(tl.minimum(length - ({column}), length - 1), 0)"
        return f"tl.minimum({column}, length - 1)"

    def _fetched(self, u: int, column: str, backward: bool) -> list[str]:
        """Reads what column `u` of a turn computes with. Past the end that is the last block again, so that it exists."""
        d = range(self.dimension)
        lines = [f"block = {self._block(column, backward)}"]
        for one in self.inputs:
            if not one.shared:
                row = self._row("block") if one.own else "(tl.cast(block, tl.int64) + sample * 0)"
                lines += self._read(
                    [f"c{u}_{one.name}_{e}" for e in range(one.size)], f"{one.name} + {row} * {one.size}"
                )
        if not backward:
            return lines if len(lines) > 1 else []
        # The mask is made a tensor, since the interpreter does not take a single truth value.
        lines += [f"given = length - 1 - ({column})", "is_given = given + sample * 0 >= 0"]
        before = f"trajectory + {self._row('tl.maximum(block - 1, 0)')} * {self.dimension}"
        lines += self._read([f"c{u}_z{i}" for i in d], before)
        return lines + self._read(
            [f"c{u}_g{i}" for i in d], f"cotangents + {self._row('given')} * {self.dimension}", "is_given"
        )

    def _groups(self, names: Sequence[str]) -> list[tuple[int, Sequence[str]]]:
        """Names in groups of equal size, whose numbers one instruction reads or writes, and where each group begins."""
        most, count = _AT_ONCE[self.program.dtype.itemsize], len(names)
        size = next(size for size in (4, 2, 1) if size <= most and count % size == 0)
        return [(e, names[e : e + size]) for e in range(0, count, size)]

    def _read(self, names: Sequence[str], place: str, mask: str = "") -> list[str]:
        lines, masked = [f"place = {place}"], f", mask={mask}, other=0" if mask else ""
        for e, group in self._groups(names):
            one = f"tl.load(place + {e}{masked})"
            several = f"read{len(group)}(place + {e}, {mask or 'None'})"
            lines.append(f"{', '.join(group)} = {one if len(group) == 1 else several}")
        return lines

    def _written(self, place: str, names: Sequence[str], mask: str) -> list[str]:
        lines = [f"place = {place}"]
        for e, group in self._groups(names):
            write = "tl.store" if len(group) == 1 else f"write{len(group)}"
            lines.append(f"{write}(place + {e}, {', '.join(group)}, {mask})")
        return lines
