"""The Triton source of Newton's method with a block in each lane: all iterations of a chain in one launch.

A program holds a slice of a sample's columns. At every iteration it composes the linearised columns: each lane gets one
affine map of all columns of the slice up to its own. To what the corrections are, one thing is missing then: the
correction in front of the slice, which the program of the slice before sends. So a slice waits only for slices before it,
and a GPU that has no room for all programs at once is never stuck. Even one after another, as Triton's interpreter runs
them, they find all that they wait for.

A slice whose residual is small ends once the slice before it has ended, since what comes in front of it is final then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pcr_fx.stopping import Outcome, rounding_level, smallest_scale
from pcr_fx.targets.triton.assignments import Known, Scalar
from pcr_fx.targets.triton.printer import print_assignments, print_scalar
from pcr_fx.targets.triton.scalars.packed import PackedSource
from pcr_fx.targets.triton.scalars.source import largest
from pcr_fx.targets.triton.scalars.unroll import Scalars
from pcr_fx.targets.triton.source import indent

# One program for each slice and sample. Programs take their numbers from `ticket` when they start, and the first slices
# of all samples come first, so that a program waits only for programs that have started before it. Memory by program:
# `states` `[programs, d, BLOCK]`; `messages` `[limit + 1, programs, d]`, the corrections of the slice's last column at each
# iteration until it ends; `ends` `[programs, 3]`, the worst of the `stats` of this slice and those before it.
_NEWTON = """
@triton.jit(do_not_specialize=["length", "samples", "limit"])
def newton({parameters}, states, messages, ends, ticket, stats, length, samples, tolerance, limit, BLOCK: tl.constexpr):
    wide = tl.full((), 0, tl.int64) + length
    columns = wide + {extra}
    slices = (columns + BLOCK - 1) // BLOCK
    program = tl.atomic_add(ticket, 1, sem="relaxed")
    programs = slices * samples
    slice = program // samples
    sample = program % samples
    before = tl.maximum(program - samples, 0)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    column = slice * BLOCK + lane
    live = column < columns
    is_last = lane == BLOCK - 1
    state = states + program * ({d} * BLOCK) + lane
{start}
    outcome = tl.full((), -1, tl.int32)
    iteration = tl.full((), 0, tl.int32)
    best_at = tl.full((), 0, tl.int32)
    residual = tl.full((), float("inf"), {real})
    best = tl.full((), float("inf"), {real})
    shown = tl.full((), 0, {real})
    # How the slices before this one ended, and whether they did; before the first there is none.
    outcome_before = tl.full((), 0, {real})
    iterations_before = tl.full((), 0, {real})
    shown_before = tl.full((), 0, {real})
    is_final = slice == 0
    while outcome < 0:
{shift}
        worst = tl.full((), 0, {real})
        against = tl.full((), 0, {real})
{linearise}
{measure}
{scan}
        verdict, shown, best, best_at = judge(
            worst, against, residual, best, best_at, iteration, limit, tolerance, {rounding_level}
        )
        residual = worst
        if is_final == 0:
            message = messages + (iteration.to(tl.int64) * programs + before) * {words}
{receive}
            if is_final:
                end = ends + before * {end_words}
{receive_end}
        # As long as slices before this one change, it cannot be expected to make progress, and its patience starts anew.
        best = tl.where(is_final, best, float("inf"))
        best_at = tl.where(is_final, best_at, iteration)
        outcome = tl.where(is_final | (verdict == {non_finite}), verdict, -1)
        is_worse = (outcome_before > {rounding}) | ((outcome >= 0) & (outcome_before > outcome))
        outcome = tl.where(is_worse, outcome_before.to(tl.int32), outcome)
        if outcome < 0:
            message = messages + (iteration.to(tl.int64) * programs + program) * {words} + lane * 0
{correct}
            iteration += 1
    shown = tl.maximum(shown, shown_before, tl.PropagateNan.ALL)
    count = tl.maximum(iteration.to({real}), iterations_before)
    end = ends + program * {end_words} + lane * 0
    message = messages + (iteration.to(tl.int64) * programs + program) * {words} + lane * 0
{end}
    if slice == slices - 1:
        tl.store(stats + sample * 3, outcome.to({real}))
        tl.store(stats + sample * 3 + 1, count)
        tl.store(stats + sample * 3 + 2, shown)
{write}
"""
# What a slice sends when it ends: its `stats`.
_ENDS = ("outcome", "iterations", "shown")


def words_of(dtype: torch.dtype) -> int:
    """Words of 64 bits that a number is sent in between programs: each holds 32 bits of it, and a tag (see `send`)."""
    return dtype.itemsize // 4


@dataclass(frozen=True)
class NewtonSource(PackedSource):
    """All iterations of Newton's method."""

    def text(self, direction: str) -> str:
        d, backward = range(self.dimension), direction == "adjoint"
        return self._compose() + _NEWTON.format(
            parameters=", ".join(["packed", *self.shared_names(), "initial", "result"]),
            d=self.dimension,
            real=self.real,
            extra=int(backward),
            words=self.dimension * self._words,
            end_words=3 * self._words,
            rounding_level=rounding_level(self.program.dtype),
            non_finite=Outcome.NON_FINITE.number,
            rounding=Outcome.ROUNDING.number,
            start=indent(
                [
                    # Adjoints start from nothing, states from where the chain does.
                    *(f"front{i} = {self.number(0.0) if backward else self.initial(i)}" for i in d),
                    *(f"z{i} = front{i} + {self.zeros}" for i in d),
                    *(f"carry{i} = {self.number(0.0)}" for i in d),
                ],
                1,
            ),
            shift=indent(self._shifted(), 2),
            linearise=indent(self._linearised(backward), 2),
            measure=indent(self._measured(backward), 2),
            scan=indent(self._scanned(), 2),
            receive=indent([*self._received("message", [f"carry{i}" for i in d]), "is_final = ends_with(word0)"], 3),
            receive_end=indent(self._received("end", [f"{name}_before" for name in _ENDS]), 4),
            correct=indent(self._corrected(), 3),
            end=indent(self._ended(), 1),
            write=indent(self._written(backward), 1),
        )

    @property
    def _words(self) -> int:
        return words_of(self.program.dtype)

    def _received(self, message: str, names: list[str]) -> list[str]:
        """Receives numbers from another program: all words are read again until none is missing."""
        words = [f"word{k}" for k in range(len(names) * self._words)]
        loads = [f"{word} = tl.load({message} + {k}, volatile=True)" for k, word in enumerate(words)]
        missing = " | ".join(f"({word} == 0)" for word in words)
        kind = self.real.removeprefix("tl.")
        numbers = [", ".join(words[k : k + self._words]) for k in range(0, len(words), self._words)]
        parsed = [f"{name} = {kind}_in({number})" for name, number in zip(names, numbers, strict=True)]
        return [*loads, f"while {missing}:", *("    " + load for load in loads), *parsed]

    def _sent(self, message: str, i: int, value: str, is_end: int, mask: str) -> str:
        return f"send({message} + {i * self._words}, {value} + {self.zeros}, {is_end}, {mask})"

    def _shifted(self) -> list[str]:
        """`x`, the state before each column: lanes get the `z` of their neighbours through memory."""
        d = range(self.dimension)
        before = "tl.load(state + {i} * BLOCK - 1, mask=lane > 0, other=0)"
        return [
            "tl.debug_barrier()",
            *(f"tl.store(state + {i} * BLOCK, z{i})" for i in d),
            "tl.debug_barrier()",
            *(f"x{i} = tl.where(lane > 0, {before.format(i=i)}, front{i})" for i in d),
        ]

    def _map(self) -> list[str]:
        """The numbers of an affine map."""
        d = range(self.dimension)
        return [*(f"j{i}_{j}" for i in d for j in d), *(f"r{i}" for i in d)]

    def _linearised(self, backward: bool) -> list[str]:
        """`v`, what each column computes of `x`, and its Jacobian `j`, which has the pullbacks of unit vectors as rows."""
        d, scalars = range(self.dimension), Scalars()
        names: list[list[Scalar]] = [[f"{letter}{i}" for i in d] for letter in "xyg"]
        state, inputs = names[1 if backward else 0], self.block_inputs()
        units: list[list[Scalar]] = [[Known.ONE if i == j else Known.ZERO for j in d] for i in d]
        rows = [scalars.run(self.body.pull, [state, *inputs, unit])[0] for unit in units]
        if backward:
            rows = [[rows[j][i] for j in d] for i in d]
            values = [scalars.dot(rows[i], names[0], names[2][i]) for i in d]
            loads = self._adjoint_loads()
        else:
            (values,) = scalars.run(self.body.step, [state, *inputs])
            loads = self.block_loads("column")
        zero = self.zeros
        lines = [*loads, *print_assignments(scalars.assignments, self.real)]
        lines += [f"v{i} = {print_scalar(value, self.real)} + {zero}" for i, value in zip(d, values, strict=True)]
        if backward:
            # The first column has no block: what was pulled back through another must not count, were it infinite.
            lines += [f"v{i} = tl.where(column > 0, v{i}, g{i})" for i in d]
        # No correction comes before the first column. Zeros in place of its Jacobian keep infinities out of the maps.
        lines += [
            f"j{i}_{j} = tl.where(column > 0, {print_scalar(rows[i][j], self.real)} + {zero}, 0)" for i in d for j in d
        ]
        return lines

    def _adjoint_loads(self) -> list[str]:
        """Column k goes back through block L - k; the first column through none."""
        _, row = self.rows()
        lines = [
            "block = tl.minimum(wide - column, wide - 1)",
            *self.block_loads("block"),
            *self.previous("y", "block"),
        ]
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
        """Composes the columns: each lane's map becomes that of all lanes up to it."""
        names = ", ".join(self._map())
        return [f"{names} = tl.associative_scan(({names}), 0, compose)"]

    def _corrected(self) -> list[str]:
        """Applies the maps to the correction in front of the slice. The last column's is sent first: others wait for it."""
        d = range(self.dimension)
        lines = []
        for i in d:
            carried = " + ".join(f"j{i}_{j} * carry{j}" for j in d)
            lines.append(f"delta{i} = r{i} + tl.where(slice > 0, {carried}, 0)")
        lines += [self._sent("message", i, f"delta{i}", 0, "is_last") for i in d]
        return [*lines, *(f"z{i} += delta{i}" for i in d), *(f"front{i} += carry{i}" for i in d)]

    def _ended(self) -> list[str]:
        """Sends to the next slice how this one ended, and that there are no more corrections."""
        values = ("outcome.to({real})", "count", "shown")
        lines = [self._sent("end", i, value.format(real=self.real), 1, "is_last") for i, value in enumerate(values)]
        return lines + [self._sent("message", i, self.number(0.0), 1, "is_last") for i in range(self.dimension)]

    def _written(self, backward: bool) -> list[str]:
        row = "wide - column" if backward else "column"
        place = f"result + (({row}) * samples + sample) * {self.dimension}"
        return [f"tl.store({place} + {i}, z{i}, mask=live)" for i in range(self.dimension)]

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
