"""The Triton source of a chain's kernels where all numbers of a block fit in a thread's registers.

Two kinds of lanes. Where blocks are solved together, each lane holds a block, all its numbers in registers, and reads
its operands packed: a row `[L]` for each number, so that neighbouring lanes read neighbouring memory. Where blocks follow
one another, each lane holds a sample, and reads operands where they lie.

Both directions are a chain. Forward, x_k = f_k(x_{k-1}). Backward, with k counted from the end, the adjoints
x_k = g_{L-1-k} + J_{L-k}^T x_{k-1}, one more than blocks: the last is the cotangent of the initial state. In memory
they lie in the order of the states: `[L + 1, samples, d]`, that of the initial state first.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from pcr_fx.body import Program
from pcr_fx.body.sample import SampleBody
from pcr_fx.codegen import Function, Known, Scalar, Scalars, print_assignments, print_scalar
from pcr_fx.kernels.gpu.inputs import HEADER, PATIENCE, REALS, ROUNDING_EPS, Input, inputs_of, smallest_scale
from pcr_fx.kernels.source import differentiable, lower_pull, lower_pullback, lower_step

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

# One lane a sample, block after block; the next block's operands are on their way while one is computed. Samples that
# are solved already (`stats`, from `newton`) are left as they are.
_SEQUENTIAL = """
@triton.jit(do_not_specialize=["length", "samples", "skip_solved"])
def sequential({parameters}, stats, length, samples, skip_solved, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.full((), 0, tl.int64) + length
    wanted = sample < samples
    if skip_solved:
        wanted = wanted & (tl.load(stats + sample * 3, mask=wanted, other=0) > 1)
    steps = tl.where(tl.max(wanted.to(tl.int32), 0) > 0, wide + {extra}, 0)
{start}
{prefetch}
    for column in range(0, steps):
{fetch_next}
{step}
{store}
{advance}
"""

# One program a slice of blocks and a group of samples, a lane a block; sums over the group's samples.
_GRADIENTS = """
@triton.jit(do_not_specialize=["length", "samples", "group"])
def gradients({parameters}, length, samples, group, BLOCK: tl.constexpr):
    wide = tl.full((), 0, tl.int64) + length
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = column < wide
    begin = tl.program_id(1).to(tl.int64) * group
    end = tl.minimum(begin + group, samples)
{zero}
    for sample in range(begin, end):
{load}
{pullback}
{add}
{write}
"""


@dataclass(frozen=True)
class ScalarSource:
    """Prints the kernels of one chain.

    Args:
        program: the chain.
        body: one block of it on one sample.

    Raises, when something is printed:
        Unprintable: the body has an op that cannot be printed, or is too large to be written out.
    """

    program: Program
    body: SampleBody

    @cached_property
    def inputs(self) -> list[Input]:
        return inputs_of(self.program, self.body)

    @cached_property
    def real(self) -> str:
        return REALS[self.program.dtype]

    @property
    def dimension(self) -> int:
        return self.body.dimension

    @cached_property
    def _step(self) -> Function:
        return lower_step(self.program, self.body)

    @cached_property
    def _pull(self) -> Function:
        return lower_pull(self.program, self.body)

    @cached_property
    def _pullback(self) -> Function:
        return lower_pullback(self.program, self.body)

    # --- whole kernels --------------------------------------------------------------------------------------

    def newton(self, direction: str) -> str:
        """All iterations of a chain, `"forward"` or `"adjoint"`, in one launch."""
        d = range(self.dimension)
        backward = direction == "adjoint"
        start = [f"start{i} = {self._initial(i) if not backward else self._number(0.0)}" for i in d]
        numbers = self._linearised(backward)
        lines = _NEWTON.format(
            parameters=", ".join(["packed", *self._shared_names(), "initial", "result"]),
            real=self.real,
            d=self.dimension,
            extra=int(backward),
            rounding=ROUNDING_EPS * torch.finfo(self.program.dtype).eps,
            patience=PATIENCE,
            start=_indent(
                [
                    *start,
                    *(f"tl.store(first_buffer + {i} * stride, start{i})" for i in d),
                    *(f"tl.store(first_buffer + buffers + {i} * stride, start{i})" for i in d),
                ],
                1,
            ),
            fill=_indent(
                (f"tl.store(first_buffer + {i} * stride + column + 1, start{i}, mask=column < columns)" for i in d), 2
            ),
            no_carry=_indent((f"carry{i} = {self._number(0.0)}" for i in d), 2),
            load_states=_indent(
                [
                    *(f"x{i} = tl.load(old + {i} * stride + column, mask=live, other=0)" for i in d),
                    *(f"z{i} = tl.load(old + {i} * stride + column + 1, mask=live, other=0)" for i in d),
                ],
                3,
            ),
            linearise=_indent(numbers, 3),
            measure=_indent(self._measured(backward), 3),
            scan=_indent(self._scanned(), 3),
            correct=_indent(self._corrected(), 3),
            write=_indent(self._written(backward), 2),
        )
        return self._combine() + lines

    def sequential(self, direction: str) -> str:
        """A chain block by block, `"forward"` or `"adjoint"`."""
        backward = direction == "adjoint"
        d = range(self.dimension)
        fetched = self._fetched("n_", "after", backward)
        names = [name for name, _ in fetched]
        first = self._fetched("c_", "0", backward)
        scalars = Scalars()
        state: list[Scalar] = [f"x{i}" for i in d]
        inputs = self._lane_inputs("c_")
        if backward:
            (result,) = scalars.run(self._pull, [[f"c_z{i}" for i in d], *inputs, state])
            # The first column has no block: it is the last cotangent, which pulls back nothing.
            result = [scalars.apply("add", f"c_g{i}", value) for i, value in zip(d, result, strict=True)]
        else:
            (result,) = scalars.run(self._step, [state, *inputs])
        step = [*print_assignments(scalars.assignments, self.real)]
        step += [f"v{i} = {print_scalar(value, self.real)} + {self._zeros}" for i, value in zip(d, result, strict=True)]
        shared = [
            f"{one.name}_{e} = tl.load({one.name} + {'sample * ' + str(one.size) + ' + ' if one.own else ''}{e}"
            f"{', mask=wanted, other=0' if one.own else ''})"
            for one in self.inputs
            if one.shared
            for e in range(one.size)
        ]
        load = "tl.load(initial + sample * {d} + {i}, mask=wanted, other=0)"
        start = [
            f"x{i} = {load.format(d=self.dimension, i=i) if not backward else self._zeros}" for i in d
        ]
        return _SEQUENTIAL.format(
            parameters=", ".join(
                [*(one.name for one in self.inputs), "initial", "trajectory", "cotangents", "result"]
            ),
            extra=int(backward),
            start=_indent([*start, *shared], 1),
            prefetch=_indent(self._addressed("0", backward) + [f"c_{name[2:]} = {value}" for name, value in first], 1),
            fetch_next=_indent(
                ["after = column + 1", *self._addressed("after", backward), *(f"{n} = {v}" for n, v in fetched)], 2
            ),
            step=_indent(step, 2),
            store=_indent(self._stored(backward), 2),
            advance=_indent([*(f"x{i} = v{i}" for i in d), *(f"c_{name[2:]} = {name}" for name in names)], 2),
        )

    def gradients(self) -> str:
        """The gradients of all operands and shared operands from the adjoints."""
        d, scalars = range(self.dimension), Scalars()
        needs = differentiable(self.program)
        state: list[Scalar] = [f"x{i}" for i in d]
        inputs = [list(numbers) for numbers in self._block_inputs()]
        _, *outputs = scalars.run(self._pullback, [state, *inputs, [f"adjoint{i}" for i in d]])
        wanted = [one for one, need in zip(self.inputs, needs, strict=True) if need]
        zero, add, write = [], [], []
        for one, numbers in zip(wanted, outputs, strict=True):
            for e, value in enumerate(numbers):
                text = f"tl.where(live, {print_scalar(value, self.real)}, 0)"
                name, place = f"sum_{one.name}_{e}", f"d_{one.name}"
                if one.own and not one.shared:
                    add.append(f"tl.store({place} + (column * samples + sample) * {one.size} + {e}, {text}, mask=live)")
                elif one.own:
                    slot = f"(tl.program_id(0).to(tl.int64) * samples + sample) * {one.size} + {e}"
                    add.append(f"tl.store({place} + {slot}, tl.sum({text} + {self._zeros}, 0))")
                else:
                    zero.append(f"{name} = {self._zeros}")
                    add.append(f"{name} += {text}")
                    group = "tl.program_id(1).to(tl.int64)"
                    if one.shared:
                        slot = f"({group} * tl.num_programs(0) + tl.program_id(0)) * {one.size} + {e}"
                        write.append(f"tl.store({place} + {slot}, tl.sum({name}, 0))")
                    else:
                        slot = f"({group} * wide + column) * {one.size} + {e}"
                        write.append(f"tl.store({place} + {slot}, {name}, mask=live)")
        load = [*self._block_loads("column"), *self._previous("x", "column")]
        load += [
            f"adjoint{i} = tl.load(adjoints + ((column + 1) * samples + sample) * {self.dimension} + {i}, mask=live, other=0)"
            for i in d
        ]
        return _GRADIENTS.format(
            parameters=", ".join(
                ["packed", *self._shared_names(), "initial", "adjoints", *(f"d_{one.name}" for one in wanted)]
            ),
            zero=_indent(zero, 1),
            load=_indent(load, 2),
            pullback=_indent(print_assignments(scalars.assignments, self.real), 2),
            add=_indent(add, 2),
            write=_indent(write, 1),
        )

    def text(self, name: str, direction: str) -> str:
        """A module with one kernel: "newton", "sequential" or "gradients"."""
        if name == "gradients":
            return HEADER + self.gradients()
        return HEADER + (self.newton(direction) if name == "newton" else self.sequential(direction))

    # --- a lane a block -------------------------------------------------------------------------------------

    def _number(self, value: float) -> str:
        return print_scalar(value, self.real)

    def _initial(self, i: int) -> str:
        return f"tl.load(initial + sample * {self.dimension} + {i})"

    def _shared_names(self) -> list[str]:
        return [one.name for one in self.inputs if one.shared]

    def _rows(self) -> tuple[dict[str, str], str]:
        """The first packed row of each input, and of what comes after them."""
        fixed, own, rows = 0, 0, {}
        for one in self.inputs:
            if not one.shared:
                rows[one.name] = f"({fixed} + {own} * samples)"
                own, fixed = (own + one.size, fixed) if one.own else (own, fixed + one.size)
        return rows, f"({fixed} + {own} * samples)"

    def _block_inputs(self) -> list[list[Scalar]]:
        return [[f"{one.name}_{e}" for e in range(one.size)] for one in self.inputs]

    def _block_loads(self, block: str) -> list[str]:
        rows, _ = self._rows()
        lines = []
        for one in self.inputs:
            for e in range(one.size):
                mine = f"sample * {one.size} + {e}" if one.own else str(e)
                if one.shared:
                    lines.append(f"{one.name}_{e} = tl.load({one.name} + {mine})")
                else:
                    row = f"({rows[one.name]} + {mine}) * wide"
                    lines.append(f"{one.name}_{e} = tl.load(packed + {row} + {block}, mask=live, other=0)")
        return lines

    def _previous(self, name: str, block: str) -> list[str]:
        """The state that each block starts from, of the packed trajectory."""
        _, row = self._rows()
        lines = []
        for i in range(self.dimension):
            place = f"packed + ({row} + sample * {self.dimension} + {i}) * wide + {block} - 1"
            lines.append(
                f"{name}{i} = tl.where({block} > 0, tl.load({place}, mask=live & ({block} > 0), other=0), {self._initial(i)})"
            )
        return lines

    def _linearised(self, backward: bool) -> list[str]:
        """`v`, what each column's function computes at `x`, and its Jacobian `j`, row by row."""
        d, scalars = range(self.dimension), Scalars()
        names: list[list[Scalar]] = [[f"{letter}{i}" for i in d] for letter in "xyg"]
        state, inputs = names[1 if backward else 0], self._block_inputs()
        units: list[list[Scalar]] = [[Known.ONE if i == j else Known.ZERO for j in d] for i in d]
        rows = [scalars.run(self._pull, [state, *inputs, unit])[0] for unit in units]
        if backward:
            rows = [[rows[j][i] for j in d] for i in d]
            values = [scalars.dot(rows[i], names[0], names[2][i]) for i in d]
            loads = self._adjoint_loads()
        else:
            (values,) = scalars.run(self._step, [state, *inputs])
            loads = self._block_loads("column")
        zero = self._zeros
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
            size = _largest(f"tl.abs(z{i})" for i in part)
            if backward:  # of the adjoints around the block
                size = _largest([size, *(f"tl.abs(x{i})" for i in part)])
            for scale, worst in ((size, "worst"), (_largest(f"terms{i}" for i in part), "against")):
                residual = _largest(f"tl.abs(r{i})" for i in part)
                lines += [
                    f"ratio = relative({residual}, {scale}, {floor})",
                    f"{worst} = tl.maximum({worst}, tl.max(tl.where(live, ratio, 0), 0))",
                ]
        return lines

    def _scanned(self) -> list[str]:
        """All columns up to each one as one affine map: in a thread's columns, then a warp's, then the program's."""
        names = [*(f"j{i}_{j}" for i in range(self.dimension) for j in range(self.dimension))]
        names += [f"r{i}" for i in range(self.dimension)]
        return [f"{', '.join(names)} = tl.associative_scan(({', '.join(names)}), 0, compose)"]

    def _corrected(self) -> list[str]:
        d = range(self.dimension)
        lines = []
        for i in d:
            carried = " + ".join(f"j{i}_{j} * carry{j}" for j in d)
            lines.append(f"delta{i} = r{i} + tl.where(first > 0, {carried}, 0)")
        lines += [f"tl.store(new + {i} * stride + column + 1, z{i} + delta{i}, mask=live)" for i in d]
        lines += [f"carry{i} = tl.sum(tl.where(lane == BLOCK - 1, delta{i}, 0), 0)" for i in d]
        return lines

    def _written(self, backward: bool) -> list[str]:
        d = self.dimension
        lines = []
        for i in range(d):
            lines.append(f"value = tl.load(solved + {i} * stride + column + 1, mask=live, other=0)")
            row = "wide - column" if backward else "column"
            lines.append(f"tl.store(result + (({row}) * samples + sample) * {d} + {i}, value, mask=live)")
        return lines

    def _combine(self) -> str:
        """The function after the one before: `(B, b) after (A, a)` is `(B A, B a + b)`."""
        d = range(self.dimension)
        maps = [[f"{letter}{i}_{j}" for i in d for j in d] + [f"{letter}{i}" for i in d] for letter in "ab"]
        products = [" + ".join(f"b{i}_{k} * a{k}_{j}" for k in d) for i in d for j in d]
        offsets = [" + ".join([f"b{i}", *(f"b{i}_{k} * a{k}" for k in d)]) for i in d]
        return (
            f"\n@triton.jit\ndef compose({', '.join([*maps[0], *maps[1]])}):\n"
            f"    return {', '.join([*products, *offsets])}\n\n"
        )

    # --- a lane a sample ------------------------------------------------------------------------------------

    @property
    def _zeros(self) -> str:
        """A zero in each lane: it makes a tensor of what may be a number that all lanes share."""
        return f"tl.zeros([BLOCK], {self.real})"

    def _lane_inputs(self, prefix: str) -> list[list[Scalar]]:
        return [
            [f"{one.name}_{e}" if one.shared else f"{prefix}{one.name}_{e}" for e in range(one.size)]
            for one in self.inputs
        ]

    def _addressed(self, column: str, backward: bool) -> list[str]:
        """The block of a column, such that reading it is allowed: past the end the last one is read again."""
        if backward:
            return [
                f"block = tl.minimum(tl.maximum(wide - {column}, 0), wide - 1)",
                f"given = wide - 1 - {column}",
                # In each lane: the interpreter makes a number of "and" between a tensor and a scalar.
                "inside = wanted & (block + sample * 0 > 0)",
                "is_given = wanted & (given + sample * 0 >= 0)",
            ]
        return [f"block = tl.minimum({column} + wide * 0, wide - 1)"]

    def _fetched(self, prefix: str, column: str, backward: bool) -> list[tuple[str, str]]:
        d, fetched = self.dimension, []
        for one in self.inputs:
            for e in range(one.size):
                if one.shared:
                    continue
                if one.own:
                    place = f"{one.name} + (block * samples + sample) * {one.size} + {e}, mask=wanted, other=0"
                else:
                    place = f"{one.name} + block * {one.size} + {e}"
                fetched.append((f"{prefix}{one.name}_{e}", f"tl.load({place})"))
        if backward:
            for i in range(d):
                mask = "mask=inside, other=0"
                before = f"tl.load(trajectory + ((block - 1) * samples + sample) * {d} + {i}, {mask})"
                start = f"tl.load(initial + sample * {d} + {i}, mask=wanted, other=0)"
                fetched.append((f"{prefix}z{i}", f"tl.where(inside, {before}, {start})"))
                mask = "mask=is_given, other=0"
                fetched.append((f"{prefix}g{i}", f"tl.load(cotangents + (given * samples + sample) * {d} + {i}, {mask})"))
        return fetched

    def _stored(self, backward: bool) -> list[str]:
        d = self.dimension
        row = "wide - column" if backward else "column"
        return [f"tl.store(result + (({row}) * samples + sample) * {d} + {i}, v{i}, mask=wanted)" for i in range(d)]


def _largest(terms: Iterable[str]) -> str:
    first, *rest = terms
    for term in rest:
        first = f"tl.maximum({first}, {term}, tl.PropagateNan.ALL)"
    return first


def _indent(lines: Sequence[str] | Iterable[str], depth: int) -> str:
    return textwrap.indent("\n".join(lines), "    " * depth)
