"""What the Triton source of a chain's kernels has in common where one program works on a block.

Both directions are a chain of columns, as in `scalars/source.py`, counted from where it starts: forward, column k is
block k; backward, column 0 is the last cotangent alone, and column k goes back through block L - k. States are read and
written where callers have them, `[L, samples, d]`, and adjoints likewise, `[L + 1, samples, d]`.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from pcr_fx.codegen import Buffer, Function
from pcr_fx.codegen.simplify import restricted
from pcr_fx.targets.triton.printer import HEADER
from pcr_fx.targets.triton.source import KernelSource
from pcr_fx.targets.triton.tiles.printer import Fetch, Printed, Sum, TilePrinter
from pcr_fx.targets.triton.tiles.tiling import padded

# Bytes of a tile at the most, which is a sixteenth of all registers. The addresses of a tile take twice as many, and the
# next tile as many again while it is read. With larger tiles kernels spill for sm_90 (`benchmarks.gpu_resources`).
TILE_BYTES = 16384


@dataclass(frozen=True)
class Text:
    """A kernel: its module, the numbers of memory that each program needs, and its warps."""

    module: str
    scratch: int
    warps: int


@dataclass(frozen=True)
class TileSource(KernelSource):
    """Prints one kind of kernel of one chain with tiles."""

    @abstractmethod
    def text(self, direction: str) -> Text:
        """The kernel `"forward"` or `"adjoint"`.

        Raises:
            Unprintable: the body has an op that cannot be printed.
        """

    @cached_property
    def functions(self) -> dict[str, Function]:
        """By name: the next state, the pullback to the state, and those to the differentiable inputs."""
        pullback = self.body.pullback
        return {
            "step": self.body.step,
            "pull": self.body.pull,
            "gradients": restricted(pullback, pullback.outputs[1:]),
        }

    @cached_property
    def constants(self) -> list[float]:
        """All constants of the functions, one after another: what every kernel of the chain reads as `constants`."""
        return [value for buffer in self._constant_buffers for value in buffer.values or ()]

    @property
    def _constant_buffers(self) -> list[Buffer]:
        return [buffer for function in self.functions.values() for buffer in function.constants]

    def printed(
        self, name: str, registers: Sequence[str], sums: dict[str, Sum], prefix: str = "v_", seeds: int = 0
    ) -> Printed:
        """One of `functions`, as lines.

        Args:
            registers: the tensors of the state and, where the function takes one, of the cotangent.
            sums: what becomes of outputs, as for `TilePrinter`; so is `prefix`.
            seeds: how many cotangents that tensor holds, `[seeds, padded d]`; 0 for one, `[padded d]`.
        """
        function = self.functions[name]
        state, *others = function.inputs
        cotangent = others[len(self.inputs) :]
        held = dict(zip([state.name, *(buffer.name for buffer in cotangent)], registers, strict=True))
        pointers = {buffer.name: f"at_{one.name}" for buffer, one in zip(others, self.inputs, strict=False)}
        offset = 0
        for buffer in self._constant_buffers:
            if buffer in function.constants:
                pointers[buffer.name] = f"(constants + {offset})"
            offset += buffer.size
        seeded = [buffer.name for buffer in cotangent] if seeds else []
        return TilePrinter(function, self.real, held, pointers, sums, prefix, TILE_BYTES, seeds, seeded).run()

    def filled(self, template: str, scratch: int, warps: int, **parts: object) -> Text:
        """A kernel from its template, whose other placeholders are `parts`."""
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
    def initial(self) -> str:
        """The initial state."""
        return f"tl.load(initial + sample * {self.dimension} + place, mask=live, other=0)"

    def previous(self, block: str) -> str:
        """The state that a block starts from.

        Masks are tensors: of "and" between a tensor and a single truth value, the interpreter makes a number.
        """
        d = self.dimension
        place = f"trajectory + (({block} - 1) * samples + sample) * {d} + place"
        return (
            f"tl.where({block} > 0, tl.load({place}, mask=live & ({block} + place * 0 > 0), other=0), {self.initial})"
        )

    def cotangent(self, prefix: str) -> str:
        """What is added in a column of the adjoint: the cotangent of its state, and nothing in the last."""
        place = f"cotangents + ({prefix}given * samples + sample) * {self.dimension} + place"
        return f"tl.load({place}, mask=live & ({prefix}given + place * 0 >= 0), other=0)"

    def block_of(self, column: str, backward: bool, prefix: str) -> list[str]:
        """Which block a column is of, and where its operands begin, by names with a prefix.

        The first column of the adjoint has no block, and is given one that may be read.
        """
        lines = [f"{prefix}block = {column}"]
        if backward:
            lines = [f"{prefix}given = wide - 1 - {column}", f"{prefix}block = tl.minimum({prefix}given + 1, wide - 1)"]
        pointers = [*self.pointers(f"{prefix}block", prefix, False), *self.pointers("0", prefix, True)]
        return [*lines, *pointers]

    def pointers(self, block: str, prefix: str, shared: bool) -> list[str]:
        """Where each input of a block begins, of those that all blocks share or of the others."""
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

    def fetched(self, fetches: Iterable[Fetch], at: str, prefix: str = "") -> list[str]:
        """Loads tiles of inputs, which begin at pointers whose names begin with `at`, as names with a prefix."""
        return [f"{prefix}{one.name} = {one.load(re.sub('^at_', at, one.pointer))}" for one in fetches]
