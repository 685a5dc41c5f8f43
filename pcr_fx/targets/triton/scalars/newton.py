"""The Triton source of Newton's method with a lane for each block: all iterations of a chain in one launch.

A program holds a slice of a sample's chain, and makes of each column one affine map of all of its slice up to there. What
its corrections depend on beside is the correction in front of its slice, which the slice before passes on at every
iteration: slices wait for those before them only. So no more of them need to run at once than a GPU has room for, and one
after another, as in Triton's interpreter, they find everything that they wait for.

A slice whose residual is small ends once the slice before has ended: what comes in front of it is final then.
"""

from __future__ import annotations

from dataclasses import dataclass

from pcr_fx.stopping import rounding_level, smallest_scale
from pcr_fx.targets.triton.inputs import words_of
from pcr_fx.targets.triton.printer import print_assignments, print_scalar
from pcr_fx.targets.triton.scalars.gradients import LanesOfBlocks
from pcr_fx.targets.triton.scalars.lanes import indent, largest
from pcr_fx.targets.triton.scalars.unroll import Known, Scalar, Scalars

# One program a slice of a sample, numbered as they start, all samples' first slices first, so that a program waits only for
# programs that were started before it. By program: `states` `[programs, d, BLOCK]`; `messages` `[limit + 1, programs, d]`,
# the corrections of each slice's last column, until it ends; `ends` `[programs, 3]` as `stats`, of all slices so far.
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
    # How the slices before have ended, and whether they have; before the first there is none.
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
            worst, against, residual, best, best_at, iteration, limit, tolerance, {rounding}
        )
        residual = worst
        if is_final == 0:
            message = messages + (iteration.to(tl.int64) * programs + before) * {words}
{receive}
            if is_final:
                end = ends + before * {end_words}
{receive_end}
        # Patience is for what does not get better although nothing before it changes.
        best = tl.where(is_final, best, float("inf"))
        best_at = tl.where(is_final, best_at, iteration)
        outcome = tl.where(is_final | (verdict == 3), verdict, -1)
        is_worse = (outcome_before > 1) | ((outcome >= 0) & (outcome_before > outcome))
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
# What a slice tells of its end, as stats.
_ENDS = ("outcome", "iterations", "shown")


@dataclass(frozen=True)
class NewtonSource(LanesOfBlocks):
    """Newton's method, in one program for each slice of a chain."""

    def newton(self, direction: str) -> str:
        """All iterations of a chain, `"forward"` or `"adjoint"`."""
        d, backward = range(self.dimension), direction == "adjoint"
        return self._compose() + _NEWTON.format(
            parameters=", ".join(["packed", *self._shared_names(), "initial", "result"]),
            d=self.dimension,
            real=self.real,
            extra=int(backward),
            words=self.dimension * self._words,
            end_words=3 * self._words,
            rounding=rounding_level(self.program.dtype),
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
        """Of 64 bits, of which a message has two for each 32 bits of a number: see `send`."""
        return words_of(self.program.dtype)

    def _received(self, message: str, names: list[str]) -> list[str]:
        """Waits for numbers that another program sends, for all at once."""
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
        """`x`, the state before that of each column, by way of memory."""
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
        """`v`, what each column's function computes at `x`, and its Jacobian `j`, row by row."""
        d, scalars = range(self.dimension), Scalars()
        names: list[list[Scalar]] = [[f"{letter}{i}" for i in d] for letter in "xyg"]
        state, inputs = names[1 if backward else 0], self._block_inputs()
        units: list[list[Scalar]] = [[Known.ONE if i == j else Known.ZERO for j in d] for i in d]
        rows = [scalars.run(self.body.pull, [state, *inputs, unit])[0] for unit in units]
        if backward:
            rows = [[rows[j][i] for j in d] for i in d]
            values = [scalars.dot(rows[i], names[0], names[2][i]) for i in d]
            loads = self._adjoint_loads()
        else:
            (values,) = scalars.run(self.body.step, [state, *inputs])
            loads = self._block_loads("column")
        zero = self.zeros
        lines = [*loads, *print_assignments(scalars.assignments, self.real)]
        lines += [f"v{i} = {print_scalar(value, self.real)} + {zero}" for i, value in zip(d, values, strict=True)]
        if backward:
            # Nothing is pulled back through the first column's block, be it infinite.
            lines += [f"v{i} = tl.where(column > 0, v{i}, g{i})" for i in d]
        # The first column's Jacobian meets no correction, and must not bring in infinities.
        lines += [
            f"j{i}_{j} = tl.where(column > 0, {print_scalar(rows[i][j], self.real)} + {zero}, 0)" for i in d for j in d
        ]
        return lines

    def _adjoint_loads(self) -> list[str]:
        """Column k goes back through block L - k; the first column through none."""
        _, row = self._rows()
        lines = [
            "block = tl.minimum(wide - column, wide - 1)",
            *self._block_loads("block"),
            *self._previous("y", "block"),
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
        """All columns up to each one as one affine map: in a thread's columns, then a warp's, then the program's."""
        names = ", ".join(self._map())
        return [f"{names} = tl.associative_scan(({names}), 0, compose)"]

    def _corrected(self) -> list[str]:
        """The maps applied to the correction before them; that of the last column is passed on first."""
        d = range(self.dimension)
        lines = []
        for i in d:
            carried = " + ".join(f"j{i}_{j} * carry{j}" for j in d)
            lines.append(f"delta{i} = r{i} + tl.where(slice > 0, {carried}, 0)")
        lines += [self._sent("message", i, f"delta{i}", 0, "is_last") for i in d]
        return [*lines, *(f"z{i} += delta{i}" for i in d), *(f"front{i} += carry{i}" for i in d)]

    def _ended(self) -> list[str]:
        """Tells the next slice: how, and that there are no more corrections."""
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
