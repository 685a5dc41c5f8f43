"""Triton source where each lane holds a sample, whose blocks follow one another, and reads operands where they lie."""

from __future__ import annotations

from dataclasses import dataclass

from pcr_fx.codegen import Scalar, Scalars, print_assignments, print_scalar
from pcr_fx.kernels.gpu.lanes import Lanes, indent

# One lane a sample, block after block; the next block's operands are on their way while one is computed. Samples that
# are solved already (`stats`, from `newton`) are left as they are.
_SEQUENTIAL = """
@triton.jit(do_not_specialize=["length", "samples", "skip_solved"])
def sequential({parameters}, stats, length, samples, skip_solved, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.full((), 0, tl.int64) + length
    wanted = sample < samples
    if skip_solved:
        wanted = wanted & (tl.load(stats + sample * 3, mask=wanted, other=0) > 1)
    steps = tl.where(tl.max(wanted.to(tl.int32), 0) > 0, wide + {extra}, 0)
{start}
{prefetch}
    for column in range(0, steps):
{fetch_next}
{step}
{store}
{advance}
"""


@dataclass(frozen=True)
class LanesOfSamples(Lanes):
    """Chains block by block."""

    def sequential(self, direction: str) -> str:
        """A chain block by block, `"forward"` or `"adjoint"`."""
        backward = direction == "adjoint"
        d = range(self.dimension)
        fetched = self._fetched("n_", "after", backward)
        names = [name for name, _ in fetched]
        first = self._fetched("c_", "0", backward)
        scalars = Scalars()
        state: list[Scalar] = [f"x{i}" for i in d]
        inputs = self._lane_inputs("c_")
        if backward:
            (result,) = scalars.run(self.pull, [[f"c_z{i}" for i in d], *inputs, state])
            # The first column has no block: it is the last cotangent, which pulls back nothing.
            result = [scalars.apply("add", f"c_g{i}", value) for i, value in zip(d, result, strict=True)]
        else:
            (result,) = scalars.run(self.step, [state, *inputs])
        step = [*print_assignments(scalars.assignments, self.real)]
        step += [f"v{i} = {print_scalar(value, self.real)} + {self.zeros}" for i, value in zip(d, result, strict=True)]
        shared = [
            f"{one.name}_{e} = tl.load({one.name} + {'sample * ' + str(one.size) + ' + ' if one.own else ''}{e}"
            f"{', mask=wanted, other=0' if one.own else ''})"
            for one in self.inputs
            if one.shared
            for e in range(one.size)
        ]
        load = "tl.load(initial + sample * {d} + {i}, mask=wanted, other=0)"
        start = [
            f"x{i} = {load.format(d=self.dimension, i=i) if not backward else self.zeros}" for i in d
        ]
        return _SEQUENTIAL.format(
            parameters=", ".join(
                [*(one.name for one in self.inputs), "initial", "trajectory", "cotangents", "result"]
            ),
            extra=int(backward),
            start=indent([*start, *shared], 1),
            prefetch=indent(self._addressed("0", backward) + [f"c_{name[2:]} = {value}" for name, value in first], 1),
            fetch_next=indent(
                ["after = column + 1", *self._addressed("after", backward), *(f"{n} = {v}" for n, v in fetched)], 2
            ),
            step=indent(step, 2),
            store=indent(self._stored(backward), 2),
            advance=indent([*(f"x{i} = v{i}" for i in d), *(f"c_{name[2:]} = {name}" for name in names)], 2),
        )

    def _lane_inputs(self, prefix: str) -> list[list[Scalar]]:
        return [
            [f"{one.name}_{e}" if one.shared else f"{prefix}{one.name}_{e}" for e in range(one.size)]
            for one in self.inputs
        ]

    def _addressed(self, column: str, backward: bool) -> list[str]:
        """The block of a column, such that reading it is allowed: past the end the last one is read again."""
        if backward:
            return [
                f"block = tl.minimum(tl.maximum(wide - {column}, 0), wide - 1)",
                f"given = wide - 1 - {column}",
                # In each lane: the interpreter makes a number of "and" between a tensor and a scalar.
                "inside = wanted & (block + sample * 0 > 0)",
                "is_given = wanted & (given + sample * 0 >= 0)",
            ]
        return [f"block = tl.minimum({column} + wide * 0, wide - 1)"]

    def _fetched(self, prefix: str, column: str, backward: bool) -> list[tuple[str, str]]:
        d, fetched = self.dimension, []
        for one in self.inputs:
            for e in range(one.size):
                if one.shared:
                    continue
                if one.own:
                    place = f"{one.name} + (block * samples + sample) * {one.size} + {e}, mask=wanted, other=0"
                else:
                    place = f"{one.name} + block * {one.size} + {e}"
                fetched.append((f"{prefix}{one.name}_{e}", f"tl.load({place})"))
        if backward:
            for i in range(d):
                mask = "mask=inside, other=0"
                before = f"tl.load(trajectory + ((block - 1) * samples + sample) * {d} + {i}, {mask})"
                start = f"tl.load(initial + sample * {d} + {i}, mask=wanted, other=0)"
                fetched.append((f"{prefix}z{i}", f"tl.where(inside, {before}, {start})"))
                mask = "mask=is_given, other=0"
                fetched.append((f"{prefix}g{i}", f"tl.load(cotangents + (given * samples + sample) * {d} + {i}, {mask})"))
        return fetched

    def _stored(self, backward: bool) -> list[str]:
        d = self.dimension
        row = "wide - column" if backward else "column"
        return [f"tl.store(result + (({row}) * samples + sample) * {d} + {i}, v{i}, mask=wanted)" for i in range(d)]
