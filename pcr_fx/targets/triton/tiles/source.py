"""The Triton source of a chain's kernels where a block is too large for a thread: one program works on a block.

Both directions are a chain, as in `source_scalars`, with columns counted from where it starts: forward, column k is block
k; backward, column 0 is the last cotangent alone, and column k goes back through block L - k. Everything lies as callers
have it: states `[L, samples, d]`, adjoints `[L + 1, samples, d]`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from pcr_fx.body import Program
from pcr_fx.codegen import Buffer, Function
from pcr_fx.codegen.simplify import restricted
from pcr_fx.stopping import smallest_scale
from pcr_fx.targets.kernel import Input, LoweredBody
from pcr_fx.targets.triton.inputs import HEADER, REALS
from pcr_fx.targets.triton.tiles.printer import Fetch, Printed, Sum, TilePrinter, padded

# Bytes of a tile at the most, a sixteenth of all registers: a tile's addresses take twice as many, and the loads of what
# comes next as many again. With more of them kernels spill for sm_90 (`benchmarks.gpu_resources`).
TILE_BYTES = 16384
# Rows of a Jacobian that are computed together, at the most: by products of matrices, of which this is the height.
_ROWS = 32

# One program a sample. Where it fits in registers the next block is fetched while one is computed. Samples that are
# solved already (`stats`, from Newton's method) are left as they are.
_SEQUENTIAL = """
@triton.jit(do_not_specialize=["length", "samples", "skip_solved"])
def sequential({parameters}, initial, trajectory, cotangents, result, stats, scratch, length, samples, skip_solved):
    sample = tl.program_id(0).to(tl.int64)
    wide = tl.full((), 0, tl.int64) + length
    steps = wide + {extra}
    if skip_solved:
        steps = tl.where(tl.load(stats + sample * 3) > 1, steps, 0)
    scratch = scratch + sample * {scratch}
    place = tl.arange(0, {padded})
    live = place < {d}
    x = {start}
{before}
    for column in range(0, steps):
{fetch}
{compute}
        tl.store(result + (({row}) * samples + sample) * {d} + place, x, mask=live)
{advance}
"""

# One program a column and sample: what the column computes, how far that is from its state, and the rows of the block's
# Jacobian, some at a time, by pulling back unit vectors.
_LINEARISE = """
@triton.jit(do_not_specialize=["length", "samples"])
def linearise(
    {parameters}, initial, trajectory, cotangents, states, jacobians, residuals, ratios, stats, scratch, length, samples
):
    program = tl.program_id(0).to(tl.int64)
    column = program // samples
    sample = program % samples
    if tl.load(stats + sample * 3) >= 0:
        return
    wide = tl.full((), 0, tl.int64) + length
    columns = wide + {extra}
    scratch = scratch + program * {scratch}
    place = tl.arange(0, {padded})
    live = place < {d}
    z = tl.load(states + (({row}) * samples + sample) * {d} + place, mask=live, other=0)
{load}
{value}
    residual = value - z
    tl.store(residuals + (sample * columns + column) * {d} + place, residual, mask=live)
    terms = tl.abs(z)
    jacobian = jacobians + (sample * columns + column) * ({d} * {d})
    for first in range(0, tl.where(column > 0, {d}, 0), {lanes}):
        index = (first + tl.arange(0, {lanes}))[:, None]
        is_unit = index == place[None, :]
        unit = tl.where(is_unit, 1, 0).to({real})
{pull}
        tl.store(jacobian + index * {d} + place[None, :], pulled, mask=(index < {d}) & live[None, :])
{terms}
    worst = tl.full((), 0, {real})
    against = tl.full((), 0, {real})
{measure}
    tl.store(ratios + sample * columns + column, worst)
    tl.store(ratios + (samples + sample) * columns + column, against)
"""

# One program a run of blocks and a group of samples; what is summed over them is added up in memory of its own. Programs
# are counted along one axis: a GPU takes no more than 65,535 of them along any other.
_GRADIENTS = """
@triton.jit(do_not_specialize=["length", "samples", "group", "run"])
def gradients({parameters}, initial, trajectory, adjoints, {results}scratch, length, samples, group, run):
    wide = tl.full((), 0, tl.int64) + length
    tiles = (wide + run - 1) // run
    tile = tl.program_id(0) % tiles
    team = tl.program_id(0) // tiles
    scratch = scratch + tl.program_id(0).to(tl.int64) * {scratch}
    place = tl.arange(0, {padded})
    live = place < {d}
    first_block = tile * run
    first_sample = team * group
    for block in range(first_block, tl.minimum(first_block + run, wide)):
        for sample in range(first_sample, tl.minimum(first_sample + group, samples)):
            x = {state}
            adjoint = tl.load(adjoints + ((block + 1) * samples + sample) * {d} + place, mask=live, other=0)
{pullback}
            tl.debug_barrier()
"""


@dataclass(frozen=True)
class Text:
    """A kernel: its module, the numbers of memory that each program needs, and its warps."""

    module: str
    scratch: int
    warps: int


@dataclass(frozen=True)
class TileSource:
    """Prints the kernels of one chain.

    Args:
        body: one block of the chain on one sample.

    Raises, when something is printed:
        Unprintable: the body has an op that cannot be printed.
    """

    body: LoweredBody

    @property
    def program(self) -> Program:
        return self.body.program

    @property
    def inputs(self) -> list[Input]:
        return self.body.inputs

    @property
    def dimension(self) -> int:
        return self.body.dimension

    @cached_property
    def real(self) -> str:
        return REALS[self.program.dtype]

    @cached_property
    def _functions(self) -> dict[str, Function]:
        pullback = self.body.pullback
        return {
            "step": self.body.step,
            "pull": self.body.pull,
            "gradients": restricted(pullback, pullback.outputs[1:]),
        }

    @cached_property
    def constants(self) -> list[float]:
        """All constants of the body's functions, one after another: what kernels read as `constants`."""
        return [value for buffer in self._constant_buffers for value in buffer.values or ()]

    @property
    def _constant_buffers(self) -> list[Buffer]:
        return [buffer for function in self._functions.values() for buffer in function.constants]

    # --- whole kernels --------------------------------------------------------------------------------------

    def sequential(self, direction: str) -> Text:
        """A chain block by block, `"forward"` or `"adjoint"`."""
        backward = direction == "adjoint"
        name = "pull" if backward else "step"
        printed = self._print(name, ["c_z", "x"] if backward else ["x"], {})
        own = self._pointer_names(shared=False)
        here = [fetch for fetch in printed.fetches if fetch.pointer in own]
        once = [fetch for fetch in printed.fetches if fetch.pointer not in own]
        held = [fetch.name for fetch in here] + (["c_z", "c_g"] if backward else [])
        before = [*self._block("wide * 0", backward, "b_"), *self._fetched(once, "b_")]
        before += self._column(here, backward, "b_", "")
        following = self._block("tl.minimum(column + 1, steps - 1)", backward, "f_")
        fetch = [*following, *self._column(here, backward, "f_", "n_")]
        (result,) = printed.results.values()
        pulled = f"tl.where(column > 0, {result}, 0) + c_g" if backward else result
        return self._text(
            _SEQUENTIAL,
            printed.scratch,
            printed.warps,
            extra=int(backward),
            start=f"tl.zeros([{padded(self.dimension)}], {self.real})" if backward else self._initial,
            before=_indent(before, 1),
            fetch=_indent(fetch, 2),
            compute=_indent([*self._block("column", backward, "at_"), *printed.lines, f"x = {pulled}"], 2),
            row="wide - column" if backward else "column",
            advance=_indent([f"{name} = n_{name}" for name in held], 2),
        )

    def linearise(self, direction: str) -> Text:
        """What an iteration of Newton's method needs to know of every column."""
        backward = direction == "adjoint"
        state = "y" if backward else "x"
        width = padded(self.dimension)
        lanes = min(width, _ROWS, max(TILE_BYTES // (width * self.program.dtype.itemsize), 1))
        pull = self._print("pull", [state, "unit"], {}, "p_", lanes)
        name, held = ("pull", [state, "x"]) if backward else ("step", [state])
        value = self._print(name, held, {})
        (row,), (result,) = pull.results.values(), value.results.values()
        row_of_states = "wide - {0}" if backward else "{0}"
        previous = f"tl.load(states + (({row_of_states.format('(column - 1)')}) * samples + sample) * {self.dimension}"
        previous = f"{previous} + place, mask=live & (column + place * 0 > 0), other=0)"
        load = [*self._block("column", backward, "at_")]
        if backward:
            load += [f"x = {previous}", f"y = {self._previous('at_block')}", f"at_g = {self._cotangent('at_')}"]
            computed = f"value = tl.where(column > 0, {result}, 0) + at_g"
            terms = [
                "size = tl.sum(tl.where(is_unit, tl.abs(x)[None, :], 0), 1)",
                "terms += tl.sum(tl.abs(pulled) * size[:, None], 0)",
            ]
        else:
            load += [f"x = tl.where(column > 0, {previous}, {self._initial})"]
            computed = f"value = {result}"
            terms = [
                "size = tl.sum(tl.where(live[None, :], tl.abs(pulled * x[None, :]), 0), 1)",
                "terms += tl.sum(tl.where(is_unit, size[:, None], 0), 0)",
            ]
        return self._text(
            _LINEARISE,
            pull.scratch + value.scratch,
            max(pull.warps, value.warps),
            extra=int(backward),
            lanes=lanes,
            row=row_of_states.format("column"),
            load=_indent(load, 1),
            value=_indent(
                [
                    *self._fetched(value.fetches, "at_"),
                    *value.lines,
                    computed,
                    *([f"scratch = scratch + {value.scratch}"] if value.scratch else []),
                    *self._fetched(pull.fetches, "at_"),
                    *pull.once,
                ],
                1,
            ),
            pull=_indent([*pull.lines, f"pulled = {row}"], 2),
            terms=_indent(terms, 2),
            measure=_indent(self._measured(backward), 1),
        )

    def gradients(self) -> Text:
        """The gradients of all operands and shared operands from the adjoints."""
        wanted = [one for one in self.inputs if one.differentiable]
        outputs = self._functions["gradients"].outputs
        sums = {buffer.name: self._sum(one) for buffer, one in zip(outputs, wanted, strict=True)}
        printed = self._print("gradients", ["x", "adjoint"], sums)
        return self._text(
            _GRADIENTS,
            printed.scratch,
            printed.warps,
            results="".join(f"d_{one.name}, " for one in wanted),
            state=self._previous("block"),
            pullback=_indent(
                [
                    *self._pointers("block", "at_", False),
                    *self._pointers("block", "at_", True),
                    *self._fetched(printed.fetches, "at_"),
                    *printed.lines,
                ],
                3,
            ),
        )

    def text(self, name: str, direction: str) -> Text:
        """A kernel: "sequential", "linearise" or "gradients"."""
        if name == "gradients":
            return self.gradients()
        return self.linearise(direction) if name == "linearise" else self.sequential(direction)

    # --- parts ----------------------------------------------------------------------------------------------

    def _print(
        self, name: str, registers: Sequence[str], sums: dict[str, Sum], prefix: str = "v_", lanes: int = 0
    ) -> Printed:
        """A function of the state, the operands and perhaps a cotangent, or as many as lanes, which `registers` hold."""
        function = self._functions[name]
        state, *others = function.inputs
        cotangent = others[len(self.inputs) :]
        held = dict(zip([state.name, *(buffer.name for buffer in cotangent)], registers, strict=True))
        pointers = {buffer.name: f"at_{one.name}" for buffer, one in zip(others, self.inputs, strict=False)}
        offset = 0
        for buffer in self._constant_buffers:
            if buffer in function.constants:
                pointers[buffer.name] = f"(constants + {offset})"
            offset += buffer.size
        batched = [buffer.name for buffer in cotangent] if lanes else []
        return TilePrinter(function, self.real, held, pointers, sums, prefix, TILE_BYTES, lanes, batched).run()

    def _text(self, template: str, scratch: int, warps: int, **parts: object) -> Text:
        names = [*(one.name for one in self.inputs), "constants"]
        kernel = template.format(
            parameters=", ".join(names),
            scratch=scratch,
            padded=padded(self.dimension),
            d=self.dimension,
            real=self.real,
            **parts,
        )
        return Text(HEADER + kernel, scratch, warps)

    @property
    def _initial(self) -> str:
        return f"tl.load(initial + sample * {self.dimension} + place, mask=live, other=0)"

    def _previous(self, block: str) -> str:
        """The state that a block starts from.

        Masks are made in each lane: the interpreter makes a number of "and" between a tensor and a scalar.
        """
        d = self.dimension
        place = f"trajectory + (({block} - 1) * samples + sample) * {d} + place"
        return (
            f"tl.where({block} > 0, tl.load({place}, mask=live & ({block} + place * 0 > 0), other=0), {self._initial})"
        )

    def _cotangent(self, prefix: str) -> str:
        """What each column of the adjoint starts from; the last one from nothing."""
        place = f"cotangents + ({prefix}given * samples + sample) * {self.dimension} + place"
        return f"tl.load({place}, mask=live & ({prefix}given + place * 0 >= 0), other=0)"

    def _block(self, column: str, backward: bool, prefix: str) -> list[str]:
        """Which block a column is of, and where its operands are. The first column of the adjoint has none, and any."""
        lines = [f"{prefix}block = {column}"]
        if backward:
            lines = [f"{prefix}given = wide - 1 - {column}", f"{prefix}block = tl.minimum({prefix}given + 1, wide - 1)"]
        pointers = [*self._pointers(f"{prefix}block", prefix, False), *self._pointers("0", prefix, True)]
        return [*lines, *pointers]

    def _pointers(self, block: str, prefix: str, shared: bool) -> list[str]:
        lines = []
        for one in self.inputs:
            if one.shared != shared:
                continue
            first = {
                (False, False): f"{block} * {one.size}",
                (False, True): f"({block} * samples + sample) * {one.size}",
                (True, False): "0",
                (True, True): f"sample * {one.size}",
            }[shared, one.own]
            lines.append(f"{prefix}{one.name} = {one.name} + {first}")
        return lines

    def _pointer_names(self, shared: bool) -> set[str]:
        return {f"at_{one.name}" for one in self.inputs if one.shared == shared}

    def _column(self, fetches: Iterable[Fetch], backward: bool, at: str, prefix: str) -> list[str]:
        """What a column of `sequential` reads, as names with a prefix."""
        lines = self._fetched(fetches, at, prefix)
        if backward:
            lines += [f"{prefix}c_z = {self._previous(f'{at}block')}", f"{prefix}c_g = {self._cotangent(at)}"]
        return lines

    def _fetched(self, fetches: Iterable[Fetch], at: str, prefix: str = "") -> list[str]:
        """Tiles of inputs that begin at pointers whose names begin with `at`."""
        return [f"{prefix}{one.name} = {one.load(re.sub('^at_', at, one.pointer))}" for one in fetches]

    def _measured(self, backward: bool) -> list[str]:
        """The largest residual relative to what the column computes, and relative to the terms of that."""
        lines, start = [], 0
        floor = smallest_scale(self.program.dtype)
        # Relative to the adjoints around a block, and to each carried state.
        size = "tl.maximum(tl.abs(z), tl.abs(x), tl.PropagateNan.ALL)" if backward else "tl.abs(z)"
        for count in [self.dimension] if backward else self.program.layout.counts:
            if count:
                lines += [
                    f"part = (place >= {start}) & (place < {start + count})",
                    "biggest = largest(tl.where(part, tl.abs(residual), 0), 0)",
                    f"size = largest(tl.where(part, {size}, 0), 0)",
                    f"worst = tl.maximum(worst, relative(biggest, size, {floor}))",
                    "size = largest(tl.where(part, terms, 0), 0)",
                    f"against = tl.maximum(against, relative(biggest, size, {floor}))",
                ]
            start += count
        return lines

    def _sum(self, one: Input) -> Sum:
        """Where a program puts the gradient of an input, and when it is the first to put something there."""
        place, first = {
            (False, False): ("team * wide + block", "sample == first_sample"),
            (False, True): ("block * samples + sample", None),
            (True, False): ("team * tiles + tile", "(block == first_block) & (sample == first_sample)"),
            (True, True): ("tile * samples + sample", "block == first_block"),
        }[one.shared, one.own]
        return Sum(f"(d_{one.name} + ({place}) * {one.size})", first)


def _indent(lines: Iterable[str], depth: int) -> str:
    return textwrap.indent("\n".join(lines), "    " * depth)
