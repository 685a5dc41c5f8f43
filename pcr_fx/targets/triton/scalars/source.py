"""The Triton source of a chain's kernels where all numbers of a block fit in a thread's registers.

Two kinds of lanes. Where blocks are solved together, each lane holds a block; where they follow one another, each lane
holds a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pcr_fx.targets.triton.inputs import HEADER
from pcr_fx.targets.triton.scalars.lanes import Lanes
from pcr_fx.targets.triton.scalars.newton import NewtonSource
from pcr_fx.targets.triton.scalars.sequential import LanesOfSamples


@dataclass(frozen=True)
class ScalarSource(Lanes):
    """All kernels of one chain."""

    def text(self, name: str, direction: str) -> str:
        """A module with one kernel: "newton", "sequential" or "gradients"."""
        if name == "sequential":
            return HEADER + self._of_samples.sequential(direction)
        return HEADER + (self._of_blocks.gradients() if name == "gradients" else self._of_blocks.newton(direction))

    @cached_property
    def _of_blocks(self) -> NewtonSource:
        return NewtonSource(self.body)

    @cached_property
    def _of_samples(self) -> LanesOfSamples:
        return LanesOfSamples(self.body)
