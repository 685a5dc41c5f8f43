"""Triton source where each lane holds a block, all its numbers in registers.

Operands are read packed: a row `[L]` for each number, so that neighbouring lanes read neighbouring memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from pcr_fx.targets.triton.printer import print_assignments, print_scalar
from pcr_fx.targets.triton.scalars.lanes import Lanes, indent
from pcr_fx.targets.triton.scalars.unroll import Scalar, Scalars

# One program a slice of blocks and a group of samples, a lane a block; sums over the group's samples. Programs are
# counted along one axis: a GPU takes no more than 65,535 of them along any other.
_GRADIENTS = """
@triton.jit(do_not_specialize=["length", "samples", "group"])
def gradients({parameters}, length, samples, group, BLOCK: tl.constexpr):
    wide = tl.full((), 0, tl.int64) + length
    tiles = (wide + BLOCK - 1) // BLOCK
    tile = tl.program_id(0) % tiles
    team = tl.program_id(0) // tiles
    column = tile * BLOCK + tl.arange(0, BLOCK)
    live = column < wide
    begin = team * group
    end = tl.minimum(begin + group, samples)
{zero}
    for sample in range(begin, end):
{load}
{pullback}
{add}
{write}
"""


@dataclass(frozen=True)
class LanesOfBlocks(Lanes):
    """How blocks' operands and states are read, and the kernel of gradients."""

    def gradients(self) -> str:
        """The gradients of all operands and shared operands from the adjoints."""
        d, scalars = range(self.dimension), Scalars()
        state: list[Scalar] = [f"x{i}" for i in d]
        inputs = [list(numbers) for numbers in self._block_inputs()]
        _, *outputs = scalars.run(self.body.pullback, [state, *inputs, [f"adjoint{i}" for i in d]])
        wanted = [one for one in self.inputs if one.differentiable]
        zero, add, write = [], [], []
        for one, numbers in zip(wanted, outputs, strict=True):
            for e, value in enumerate(numbers):
                text = f"tl.where(live, {print_scalar(value, self.real)}, 0)"
                name, place = f"sum_{one.name}_{e}", f"d_{one.name}"
                if one.own and not one.shared:
                    add.append(f"tl.store({place} + (column * samples + sample) * {one.size} + {e}, {text}, mask=live)")
                elif one.own:
                    slot = f"(tile * samples + sample) * {one.size} + {e}"
                    add.append(f"tl.store({place} + {slot}, tl.sum({text} + {self.zeros}, 0))")
                else:
                    zero.append(f"{name} = {self.zeros}")
                    add.append(f"{name} += {text}")
                    if one.shared:
                        slot = f"(team * tiles + tile) * {one.size} + {e}"
                        write.append(f"tl.store({place} + {slot}, tl.sum({name}, 0))")
                    else:
                        slot = f"(team * wide + column) * {one.size} + {e}"
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
            zero=indent(zero, 1),
            load=indent(load, 2),
            pullback=indent(print_assignments(scalars.assignments, self.real), 2),
            add=indent(add, 2),
            write=indent(write, 1),
        )

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
                f"{name}{i} = tl.where({block} > 0, tl.load({place}, mask=live & ({block} > 0), other=0), {self.initial(i)})"
            )
        return lines

    def initial(self, i: int) -> str:
        return f"tl.load(initial + sample * {self.dimension} + {i})"
