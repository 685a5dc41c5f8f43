"""The Triton source of Newton's method with a lane for each block.

One program can hold a sample's whole chain, slice after slice, and iterate until it is solved: one launch. Where a chain
has many slices and there are few samples, most of a GPU would idle; then each slice has a program of its own, and an
iteration is three launches: `linearise` makes of each column one affine map of all of its slice up to there, `link` goes
through the maps of whole slices and judges, and `correct` applies the maps to what comes in front of their slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pcr_fx.codegen import Known, Scalar, Scalars, print_assignments, print_scalar
from pcr_fx.kernels.gpu.inputs import PATIENCE, ROUNDING_EPS, smallest_scale
from pcr_fx.kernels.gpu.lanes import indent, largest
from pcr_fx.kernels.gpu.lanes_of_blocks import LanesOfBlocks

# One program a sample; the states of all columns in two buffers [2, samples, d, columns + 1], read from one and
# written to the other in turn. Column 0 is where the chain starts.
_NEWTON = """
@triton.jit(do_not_specialize=["length", "samples", "limit"])
def newton({parameters}, states, stats, length, samples, tolerance, limit, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    wide = tl.full((), 0, tl.int64) + length
    columns = wide + {extra}
    stride = columns + 1
    lane = tl.arange(0, BLOCK).to(tl.int64)
    first_buffer = states + sample * ({d} * stride)
    buffers = samples * ({d} * stride)
{start}
    for first in range(0, columns, BLOCK):
        column = first + lane
{fill}
    outcome = tl.full((), -1, tl.int32)
    iteration = tl.full((), 0, tl.int32)
    best_at = tl.full((), 0, tl.int32)
    parity = tl.full((), 0, tl.int32)
    residual = tl.full((), float("inf"), {real})
    best = tl.full((), float("inf"), {real})
    while outcome < 0:
        tl.debug_barrier()
        last = residual
        old = first_buffer + parity * buffers
        new = first_buffer + (1 - parity) * buffers
        worst = tl.full((), 0, {real})
        against = tl.full((), 0, {real})
{no_carry}
        for first in range(0, columns, BLOCK):
            column = first + lane
            live = column < columns
{load_states}
{linearise}
{measure}
{scan}
{correct}
        residual = worst
        outcome, residual, best, best_at = judge(
            residual, against, last, best, best_at, iteration, limit, tolerance, {rounding}, {patience}
        )
        parity = tl.where(outcome < 0, 1 - parity, parity)
        iteration = tl.where(outcome < 0, iteration + 1, iteration)
    tl.store(stats + sample * 3, outcome.to({real}))
    tl.store(stats + sample * 3 + 1, iteration.to({real}))
    tl.store(stats + sample * 3 + 2, residual)
    tl.debug_barrier()
    solved = first_buffer + parity * buffers
    for first in range(0, columns, BLOCK):
        column = first + lane
        live = column < columns
{write}
"""

# One program a slice of a sample's columns. States `[samples, d, columns + 1]`, with where the chain starts in front; maps
# `[samples, d d + d, columns]`, matrices first; ratios `[2, samples, slices]`.
_LINEARISE = """
@triton.jit(do_not_specialize=["length", "samples"])
def linearise({parameters}, states, maps, ratios, stats, length, samples, BLOCK: tl.constexpr):
    wide = tl.full((), 0, tl.int64) + length
    columns = wide + {extra}
    stride = columns + 1
    slices = (columns + BLOCK - 1) // BLOCK
    sample = tl.program_id(0) // slices
    number = tl.program_id(0) % slices
    if tl.load(stats + sample * 3) >= 0:
        return
    column = number * BLOCK + tl.arange(0, BLOCK)
    live = column < columns
    old = states + sample * ({d} * stride)
    worst = tl.full((), 0, {real})
    against = tl.full((), 0, {real})
{load_states}
{linearise}
{measure}
    tl.store(ratios + sample * slices + number, worst)
    tl.store(ratios + (samples + sample) * slices + number, against)
{scan}
    map = maps + sample * ({rows} * columns) + column
{keep}
"""

# One program a sample; carries `[samples, d, slices]` are the corrections in front of each slice but the first.
_LINK = """
@triton.jit(do_not_specialize=["columns", "samples", "iteration", "limit"])
def link(
    maps, carries, ratios, stats, history, columns, samples, iteration, limit, tolerance,
    SLICE: tl.constexpr, BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    if tl.load(stats + sample * 3) >= 0:
        return
    wide = tl.full((), 0, tl.int64) + columns
    slices = (wide + SLICE - 1) // SLICE
    outcome = decide_sample(
        ratios, stats, history, sample, slices, samples, iteration, limit, tolerance, {rounding}, {patience}, BLOCK
    )
    lane = tl.arange(0, BLOCK).to(tl.int64)
{no_carry}
    for first in range(0, tl.where(outcome < 0, slices, 0), BLOCK):
        slice = first + lane
        live = slice < slices
        map = maps + sample * ({rows} * wide) + tl.minimum((slice + 1) * SLICE, wide) - 1
{load_maps}
{scan}
{carry}
"""

# One program a slice of a sample's columns, as in `linearise`.
_CORRECT = """
@triton.jit(do_not_specialize=["columns"])
def correct(states, maps, carries, stats, columns, BLOCK: tl.constexpr):
    wide = tl.full((), 0, tl.int64) + columns
    slices = (wide + BLOCK - 1) // BLOCK
    sample = tl.program_id(0) // slices
    number = tl.program_id(0) % slices
    if tl.load(stats + sample * 3) >= 0:
        return
    column = number * BLOCK + tl.arange(0, BLOCK)
    live = column < wide
    map = maps + sample * ({rows} * wide) + column
    state = states + sample * ({d} * (wide + 1)) + column + 1
{load_maps}
{correct}
"""


@dataclass(frozen=True)
class NewtonSource(LanesOfBlocks):
    """Newton's method, in one program a sample or in one for each slice of its chain."""

    def newton(self, direction: str) -> str:
        """All iterations of a chain, `"forward"` or `"adjoint"`, in one launch."""
        d = range(self.dimension)
        backward = direction == "adjoint"
        start = [f"start{i} = {self.initial(i) if not backward else self.number(0.0)}" for i in d]
        return self._compose() + _NEWTON.format(
            **self._common(backward),
            parameters=", ".join(["packed", *self._shared_names(), "initial", "result"]),
            start=indent(
                [
                    *start,
                    *(f"tl.store(first_buffer + {i} * stride, start{i})" for i in d),
                    *(f"tl.store(first_buffer + buffers + {i} * stride, start{i})" for i in d),
                ],
                1,
            ),
            fill=indent(
                (f"tl.store(first_buffer + {i} * stride + column + 1, start{i}, mask=column < columns)" for i in d), 2
            ),
            no_carry=indent(self._no_carry(), 2),
            load_states=indent(self._states(), 3),
            linearise=indent(self._linearised(backward), 3),
            measure=indent(self._measured(backward), 3),
            scan=indent(self._scanned(), 3),
            correct=indent(
                [
                    *self._corrections("first > 0"),
                    *(f"tl.store(new + {i} * stride + column + 1, z{i} + delta{i}, mask=live)" for i in d),
                    *self._carried(),
                ],
                3,
            ),
            write=indent(self._written(backward), 2),
        )

    def linearise(self, direction: str) -> str:
        """A slice's maps, and its residual."""
        backward = direction == "adjoint"
        return self._compose() + _LINEARISE.format(
            **self._common(backward),
            parameters=", ".join(["packed", *self._shared_names(), "initial"]),
            load_states=indent(self._states(), 1),
            linearise=indent(self._linearised(backward), 1),
            measure=indent(self._measured(backward), 1),
            scan=indent(self._scanned(), 1),
            keep=indent(
                (f"tl.store(map + {row} * columns, {name}, mask=live)" for row, name in enumerate(self._map())), 1
            ),
        )

    def link(self) -> str:
        """What comes in front of each slice, once it is known whether another correction is needed."""
        place = "carries + (sample * {d} + {i}) * slices + slice + 1"
        stores = [
            f"tl.store({place.format(d=self.dimension, i=i)}, delta{i}, mask=slice + 1 < slices)"
            for i in range(self.dimension)
        ]
        return self._compose() + _LINK.format(
            **self._common(),
            no_carry=indent(self._no_carry(), 1),
            load_maps=indent(self._map_loads(), 2),
            scan=indent(self._scanned(), 2),
            carry=indent([*self._corrections("first > 0"), *stores, *self._carried()], 2),
        )

    def correct(self) -> str:
        """A slice's states."""
        d = range(self.dimension)
        carries = f"carries + (sample * {self.dimension} + {{i}}) * slices + number, mask=number > 0, other=0"
        loads = [f"carry{i} = tl.load({carries.format(i=i)})" for i in d]
        kept = [f"z{i} = tl.load(state + {i} * (wide + 1), mask=live, other=0)" for i in d]
        stores = [f"tl.store(state + {i} * (wide + 1), z{i} + delta{i}, mask=live)" for i in d]
        return _CORRECT.format(
            **self._common(),
            load_maps=indent(self._map_loads(), 1),
            correct=indent([*loads, *self._corrections("number > 0"), *kept, *stores], 1),
        )

    def _common(self, backward: bool = False) -> dict[str, object]:
        return {
            "d": self.dimension,
            "rows": len(self._map()),
            "real": self.real,
            "extra": int(backward),
            "rounding": ROUNDING_EPS * torch.finfo(self.program.dtype).eps,
            "patience": PATIENCE,
        }

    def _map(self) -> list[str]:
        """The numbers of an affine map."""
        d = range(self.dimension)
        return [*(f"j{i}_{j}" for i in d for j in d), *(f"r{i}" for i in d)]

    def _map_loads(self) -> list[str]:
        return [f"{name} = tl.load(map + {row} * wide, mask=live, other=0)" for row, name in enumerate(self._map())]

    def _states(self) -> list[str]:
        """`z`, the state of each column, and `x`, that before it."""
        d = range(self.dimension)
        return [
            *(f"x{i} = tl.load(old + {i} * stride + column, mask=live, other=0)" for i in d),
            *(f"z{i} = tl.load(old + {i} * stride + column + 1, mask=live, other=0)" for i in d),
        ]

    def _linearised(self, backward: bool) -> list[str]:
        """`v`, what each column's function computes at `x`, and its Jacobian `j`, row by row."""
        d, scalars = range(self.dimension), Scalars()
        names: list[list[Scalar]] = [[f"{letter}{i}" for i in d] for letter in "xyg"]
        state, inputs = names[1 if backward else 0], self._block_inputs()
        units: list[list[Scalar]] = [[Known.ONE if i == j else Known.ZERO for j in d] for i in d]
        rows = [scalars.run(self.pull, [state, *inputs, unit])[0] for unit in units]
        if backward:
            rows = [[rows[j][i] for j in d] for i in d]
            values = [scalars.dot(rows[i], names[0], names[2][i]) for i in d]
            loads = self._adjoint_loads()
        else:
            (values,) = scalars.run(self.step, [state, *inputs])
            loads = self._block_loads("column")
        zero = self.zeros
        lines = [*loads, *print_assignments(scalars.assignments, self.real)]
        lines += [f"v{i} = {print_scalar(value, self.real)} + {zero}" for i, value in zip(d, values, strict=True)]
        # The first column's Jacobian meets no correction, and must not bring in infinities.
        lines += [
            f"j{i}_{j} = tl.where(column > 0, {print_scalar(rows[i][j], self.real)} + {zero}, 0)" for i in d for j in d
        ]
        return lines

    def _adjoint_loads(self) -> list[str]:
        """Column k goes back through block L - k; the first column through none."""
        _, row = self._rows()
        lines = ["block = tl.minimum(wide - column, wide - 1)", *self._block_loads("block"), *self._previous("y", "block")]
        for i in range(self.dimension):
            place = f"packed + ({row} + (samples + sample) * {self.dimension} + {i}) * wide + wide - 1 - column"
            lines.append(f"g{i} = tl.load({place}, mask=column < wide, other=0)")
        return lines

    def _measured(self, backward: bool) -> list[str]:
        """The largest residual relative to what each column computes, and relative to the terms of that."""
        d = range(self.dimension)
        lines = [f"r{i} = v{i} - z{i}" for i in d]
        for i in d:
            terms = " + ".join([f"tl.abs(z{i})", *(f"tl.abs(j{i}_{j}) * tl.abs(x{j})" for j in d)])
            lines.append(f"terms{i} = {terms}")
        floor = smallest_scale(self.program.dtype)
        start = 0
        for count in [self.dimension] if backward else self.program.layout.counts:
            part = range(start, start + count)
            start += count
            if not count:
                continue
            size = largest(f"tl.abs(z{i})" for i in part)
            if backward:  # of the adjoints around the block
                size = largest([size, *(f"tl.abs(x{i})" for i in part)])
            for scale, worst in ((size, "worst"), (largest(f"terms{i}" for i in part), "against")):
                residual = largest(f"tl.abs(r{i})" for i in part)
                lines += [
                    f"ratio = relative({residual}, {scale}, {floor})",
                    f"{worst} = tl.maximum({worst}, tl.max(tl.where(live, ratio, 0), 0))",
                ]
        return lines

    def _scanned(self) -> list[str]:
        """All columns up to each one as one affine map: in a thread's columns, then a warp's, then the program's."""
        names = ", ".join(self._map())
        return [f"{names} = tl.associative_scan(({names}), 0, compose)"]

    def _no_carry(self) -> list[str]:
        return [f"carry{i} = {self.number(0.0)}" for i in range(self.dimension)]

    def _corrections(self, is_carried: str) -> list[str]:
        """The maps applied to the correction in front of them, `carry`, where there is one."""
        lines = []
        for i in range(self.dimension):
            carried = " + ".join(f"j{i}_{j} * carry{j}" for j in range(self.dimension))
            lines.append(f"delta{i} = r{i} + tl.where({is_carried}, {carried}, 0)")
        return lines

    def _carried(self) -> list[str]:
        """The last lane's correction is in front of what comes next."""
        return [f"carry{i} = tl.sum(tl.where(lane == BLOCK - 1, delta{i}, 0), 0)" for i in range(self.dimension)]

    def _written(self, backward: bool) -> list[str]:
        d = self.dimension
        lines = []
        for i in range(d):
            lines.append(f"value = tl.load(solved + {i} * stride + column + 1, mask=live, other=0)")
            row = "wide - column" if backward else "column"
            lines.append(f"tl.store(result + (({row}) * samples + sample) * {d} + {i}, value, mask=live)")
        return lines

    def _compose(self) -> str:
        """The function after the one before: `(B, b) after (A, a)` is `(B A, B a + b)`."""
        d = range(self.dimension)
        maps = [[f"{letter}{i}_{j}" for i in d for j in d] + [f"{letter}{i}" for i in d] for letter in "ab"]
        products = [" + ".join(f"b{i}_{k} * a{k}_{j}" for k in d) for i in d for j in d]
        offsets = [" + ".join([f"b{i}", *(f"b{i}_{k} * a{k}" for k in d)]) for i in d]
        return (
            f"\n@triton.jit\ndef compose({', '.join([*maps[0], *maps[1]])}):\n"
            f"    return {', '.join([*products, *offsets])}\n\n"
        )
