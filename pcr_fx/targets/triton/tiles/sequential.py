"""The Triton source of a chain block by block, where one program works on a block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pcr_fx.stopping import Outcome
from pcr_fx.targets.triton.source import indent
from pcr_fx.targets.triton.tiles.printer import Fetch
from pcr_fx.targets.triton.tiles.source import Text, TileSource
from pcr_fx.targets.triton.tiles.tiling import padded

# One program for each sample. What the next block reads is loaded while one is computed, if registers have room for both.
# With `skip_solved`, samples that Newton's method solved, as `stats` tells, are left as they are.
_SEQUENTIAL = """
@triton.jit(do_not_specialize=["length", "samples", "skip_solved"])
def sequential({parameters}, initial, trajectory, cotangents, result, stats, scratch, length, samples, skip_solved):
    sample = tl.program_id(0).to(tl.int64)
    wide = tl.full((), 0, tl.int64) + length
    steps = wide + {extra}
    if skip_solved:
        steps = tl.where(tl.load(stats + sample * 3) > {rounding}, steps, 0)
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


@dataclass(frozen=True)
class SequentialSource(TileSource):
    """A chain block by block."""

    def text(self, direction: str) -> Text:
        backward = direction == "adjoint"
        name = "pull" if backward else "step"
        printed = self.printed(name, ["c_z", "x"] if backward else ["x"], {})
        of_blocks = {f"at_{one.name}" for one in self.inputs if not one.shared}
        each = [fetch for fetch in printed.fetches if fetch.pointer in of_blocks]
        once = [fetch for fetch in printed.fetches if fetch.pointer not in of_blocks]
        held = [fetch.name for fetch in each] + (["c_z", "c_g"] if backward else [])
        before = [*self.block_of("wide * 0", backward, "b_"), *self.fetched(once, "b_")]
        before += self._column(each, backward, "b_", "")
        following = self.block_of("tl.minimum(column + 1, steps - 1)", backward, "f_")
        fetch = [*following, *self._column(each, backward, "f_", "n_")]
        (result,) = printed.results.values()
        pulled = f"tl.where(column > 0, {result}, 0) + c_g" if backward else result
        return self.filled(
            _SEQUENTIAL,
            printed.scratch,
            printed.warps,
            extra=int(backward),
            rounding=Outcome.ROUNDING.number,
            start=f"tl.zeros([{padded(self.dimension)}], {self.real})" if backward else self.initial,
            before=indent(before, 1),
            fetch=indent(fetch, 2),
            compute=indent([*self.block_of("column", backward, "at_"), *printed.lines, f"x = {pulled}"], 2),
            row="wide - column" if backward else "column",
            advance=indent([f"{name} = n_{name}" for name in held], 2),
        )

    def _column(self, fetches: Iterable[Fetch], backward: bool, at: str, prefix: str) -> list[str]:
        """Reads what a column computes with, as names with a prefix."""
        lines = self.fetched(fetches, at, prefix)
        if backward:
            lines += [f"{prefix}c_z = {self.previous(f'{at}block')}", f"{prefix}c_g = {self.cotangent(at)}"]
        return lines
