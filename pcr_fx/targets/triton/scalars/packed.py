"""How kernels with a block in each lane read operands and states.

Operands are read packed, a row `[L]` for each number, so that neighbouring lanes read neighbouring memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from pcr_fx.targets.triton.assignments import Scalar
from pcr_fx.targets.triton.scalars.source import ScalarSource


@dataclass(frozen=True)
class PackedSource(ScalarSource):
    """Reads what `Arguments.packed` is made of."""

    def shared_names(self) -> list[str]:
        """The parameters of what is read where it lies, since all blocks share it."""
        return [one.name for one in self.inputs if one.shared]

    def rows(self) -> tuple[dict[str, str], str]:
        """The first packed row of each input, and of what comes after them."""
        fixed, of_samples, rows = 0, 0, {}
        for one in self.inputs:
            if not one.shared:
                rows[one.name] = f"({fixed} + {of_samples} * samples)"
                of_samples, fixed = (of_samples + one.size, fixed) if one.own else (of_samples, fixed + one.size)
        return rows, f"({fixed} + {of_samples} * samples)"

    def block_inputs(self) -> list[list[Scalar]]:
        """The numbers of each input, by the names that `block_loads` gives them."""
        return [[f"{one.name}_{e}" for e in range(one.size)] for one in self.inputs]

    def block_loads(self, block: str) -> list[str]:
        """Loads all inputs of the block that the expression `block` tells of each lane."""
        rows, _ = self.rows()
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

    def previous(self, name: str, block: str) -> list[str]:
        """The state that each block starts from, of the packed trajectory."""
        _, row = self.rows()
        lines = []
        for i in range(self.dimension):
            place = f"packed + ({row} + sample * {self.dimension} + {i}) * wide + {block} - 1"
            lines.append(
                f"{name}{i} = tl.where({block} > 0, tl.load({place}, mask=live & ({block} > 0), other=0), {self.initial(i)})"
            )
        return lines

    def initial(self, i: int) -> str:
        """Number `i` of the initial state."""
        return f"tl.load(initial + sample * {self.dimension} + {i})"
