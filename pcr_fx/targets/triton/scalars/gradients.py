"""The Triton source of gradients from the adjoints, with a block in each lane."""

from __future__ import annotations

from dataclasses import dataclass

from pcr_fx.targets.kernel import Input
from pcr_fx.targets.triton.assignments import Scalar
from pcr_fx.targets.triton.printer import print_assignments, print_scalar
from pcr_fx.targets.triton.scalars.packed import PackedSource
from pcr_fx.targets.triton.scalars.unroll import Scalars
from pcr_fx.targets.triton.source import indent

# A program takes a run of blocks, one in each lane, and a group of samples, over which it sums what samples share.
# Programs are counted along the first axis only, since a GPU takes no more than 65,535 of them along any other.
_GRADIENTS = """
@triton.jit(do_not_specialize=["length", "samples", "group"])
def gradients({parameters}, length, samples, group, BLOCK: tl.constexpr):
    wide = tl.full((), 0, tl.int64) + length
    runs = (wide + BLOCK - 1) // BLOCK
    index = tl.program_id(0) % runs
    team = tl.program_id(0) // runs
    column = index * BLOCK + tl.arange(0, BLOCK)
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
class GradientsSource(PackedSource):
    """The gradients of all operands and shared operands."""

    def text(self, direction: str) -> str:
        d, scalars = range(self.dimension), Scalars()
        state: list[Scalar] = [f"x{i}" for i in d]
        adjoint: list[Scalar] = [f"adjoint{i}" for i in d]
        _, *outputs = scalars.run(self.body.pullback, [state, *self.block_inputs(), adjoint])
        wanted = [one for one in self.inputs if one.differentiable]
        parts = [
            self._written(one, e, value)
            for one, numbers in zip(wanted, outputs, strict=True)
            for e, value in enumerate(numbers)
        ]
        zero, add, write = ([line for part in parts for line in part[when]] for when in range(3))
        place = f"adjoints + ((column + 1) * samples + sample) * {self.dimension}"
        load = [*self.block_loads("column"), *self.previous("x", "column")]
        load += [f"{name} = tl.load({place} + {i}, mask=live, other=0)" for i, name in enumerate(adjoint)]
        return _GRADIENTS.format(
            parameters=", ".join(
                ["packed", *self.shared_names(), "initial", "adjoints", *(f"d_{one.name}" for one in wanted)]
            ),
            zero=indent(zero, 1),
            load=indent(load, 2),
            pullback=indent(print_assignments(scalars.assignments, self.real), 2),
            add=indent(add, 2),
            write=indent(write, 1),
        )

    def _written(self, one: Input, e: int, value: Scalar) -> tuple[list[str], list[str], list[str]]:
        """Lines for number `e` of an input's gradient: before the loop over samples, in it, and after it."""
        text = f"tl.where(live, {print_scalar(value, self.real)}, 0)"
        total, place = f"sum_{one.name}_{e}", f"d_{one.name}"
        if one.own and not one.shared:
            return [], [f"tl.store({place} + (column * samples + sample) * {one.size} + {e}, {text}, mask=live)"], []
        if one.own:
            slot = f"(index * samples + sample) * {one.size} + {e}"
            return [], [f"tl.store({place} + {slot}, tl.sum({text} + {self.zeros}, 0))"], []
        if one.shared:
            slot = f"(team * runs + index) * {one.size} + {e}"
            write = f"tl.store({place} + {slot}, tl.sum({total}, 0))"
        else:
            slot = f"(team * wide + column) * {one.size} + {e}"
            write = f"tl.store({place} + {slot}, {total}, mask=live)"
        return [f"{total} = {self.zeros}"], [f"{total} += {text}"], [write]
