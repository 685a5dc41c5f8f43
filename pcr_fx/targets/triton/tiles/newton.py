"""The Triton source of what an iteration of Newton's method evaluates, where one program works on a block."""

from __future__ import annotations

from dataclasses import dataclass

from pcr_fx.stopping import smallest_scale
from pcr_fx.targets.triton.source import indent
from pcr_fx.targets.triton.tiles.source import TILE_BYTES, Text, TileSource
from pcr_fx.targets.triton.tiles.tiling import padded

# Rows of a Jacobian that are computed together, at the most. Together they are products of matrices, of this height.
_ROWS = 32

# One program for each column and sample: what the column computes, how far that is from its state, and the rows of the
# block's Jacobian, some at a time, which are pullbacks of unit vectors.
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
    for first in range(0, tl.where(column > 0, {d}, 0), {seeds}):
        index = (first + tl.arange(0, {seeds}))[:, None]
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


@dataclass(frozen=True)
class LineariseSource(TileSource):
    """The residual and Jacobian of every column, and how large the residual is."""

    def text(self, direction: str) -> Text:
        backward = direction == "adjoint"
        state = "y" if backward else "x"
        width = padded(self.dimension)
        seeds = min(width, _ROWS, max(TILE_BYTES // (width * self.program.dtype.itemsize), 1))
        pull = self.printed("pull", [state, "unit"], {}, "p_", seeds)
        name, held = ("pull", [state, "x"]) if backward else ("step", [state])
        value = self.printed(name, held, {})
        (row,), (result,) = pull.results.values(), value.results.values()
        row_of_states = "wide - {0}" if backward else "{0}"
        previous = f"tl.load(states + (({row_of_states.format('(column - 1)')}) * samples + sample) * {self.dimension}"
        previous = f"{previous} + place, mask=live & (column + place * 0 > 0), other=0)"
        load = [*self.block_of("column", backward, "at_")]
        if backward:
            load += [f"x = {previous}", f"y = {self.previous('at_block')}", f"at_g = {self.cotangent('at_')}"]
            computed = f"value = tl.where(column > 0, {result}, 0) + at_g"
            terms = [
                "size = tl.sum(tl.where(is_unit, tl.abs(x)[None, :], 0), 1)",
                "terms += tl.sum(tl.abs(pulled) * size[:, None], 0)",
            ]
        else:
            load += [f"x = tl.where(column > 0, {previous}, {self.initial})"]
            computed = f"value = {result}"
            terms = [
                "size = tl.sum(tl.where(live[None, :], tl.abs(pulled * x[None, :]), 0), 1)",
                "terms += tl.sum(tl.where(is_unit, size[:, None], 0), 0)",
            ]
        return self.filled(
            _LINEARISE,
            pull.scratch + value.scratch,
            max(pull.warps, value.warps),
            extra=int(backward),
            seeds=seeds,
            row=row_of_states.format("column"),
            load=indent(load, 1),
            value=indent(
                [
                    *self.fetched(value.fetches, "at_"),
                    *value.lines,
                    computed,
                    *([f"scratch = scratch + {value.scratch}"] if value.scratch else []),
                    *self.fetched(pull.fetches, "at_"),
                    *pull.once,
                ],
                1,
            ),
            pull=indent([*pull.lines, f"pulled = {row}"], 2),
            terms=indent(terms, 2),
            measure=indent(self._measured(backward), 1),
        )

    def _measured(self, backward: bool) -> list[str]:
        """The largest residual, relative to what the column computes (`worst`), and to the terms of that (`against`)."""
        lines, start = [], 0
        floor = smallest_scale(self.program.dtype)
        # Adjoints are relative to those around their block, states to all numbers of their carried tensor.
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
