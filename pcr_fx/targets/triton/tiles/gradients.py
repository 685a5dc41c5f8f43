"""The Triton source of gradients from the adjoints, where one program works on a block."""

from __future__ import annotations

from dataclasses import dataclass

from pcr_fx.targets.kernel import Input
from pcr_fx.targets.triton.source import indent
from pcr_fx.targets.triton.tiles.printer import Sum
from pcr_fx.targets.triton.tiles.source import Text, TileSource

# A program takes a run of blocks and a group of samples, and sums what those share in memory that only it writes.
# Programs are counted along the first axis only, since a GPU takes no more than 65,535 of them along any other.
_GRADIENTS = """
@triton.jit(do_not_specialize=["length", "samples", "group", "run"])
def gradients({parameters}, initial, trajectory, adjoints, {results}scratch, length, samples, group, run):
    wide = tl.full((), 0, tl.int64) + length
    runs = (wide + run - 1) // run
    index = tl.program_id(0) % runs
    team = tl.program_id(0) // runs
    scratch = scratch + tl.program_id(0).to(tl.int64) * {scratch}
    place = tl.arange(0, {padded})
    live = place < {d}
    first_block = index * run
    first_sample = team * group
    for block in range(first_block, tl.minimum(first_block + run, wide)):
        for sample in range(first_sample, tl.minimum(first_sample + group, samples)):
            x = {state}
            adjoint = tl.load(adjoints + ((block + 1) * samples + sample) * {d} + place, mask=live, other=0)
{pullback}
            tl.debug_barrier()
"""


@dataclass(frozen=True)
class GradientsSource(TileSource):
    """The gradients of all operands and shared operands."""

    def text(self, direction: str) -> Text:
        wanted = [one for one in self.inputs if one.differentiable]
        outputs = self.functions["gradients"].outputs
        sums = {buffer.name: self._sum(one) for buffer, one in zip(outputs, wanted, strict=True)}
        printed = self.printed("gradients", ["x", "adjoint"], sums)
        return self.filled(
            _GRADIENTS,
            printed.scratch,
            printed.warps,
            results="".join(f"d_{one.name}, " for one in wanted),
            state=self.previous("block"),
            pullback=indent(
                [
                    *self.pointers("block", "at_", False),
                    *self.pointers("block", "at_", True),
                    *self.fetched(printed.fetches, "at_"),
                    *printed.lines,
                ],
                3,
            ),
        )

    def _sum(self, one: Input) -> Sum:
        """Where a program puts the gradient of an input, and when it is the first to put something there."""
        place, first = {
            (False, False): ("team * wide + block", "sample == first_sample"),
            (False, True): ("block * samples + sample", None),
            (True, False): ("team * runs + index", "(block == first_block) & (sample == first_sample)"),
            (True, True): ("index * samples + sample", "block == first_block"),
        }[one.shared, one.own]
        return Sum(f"(d_{one.name} + ({place}) * {one.size})", first)
