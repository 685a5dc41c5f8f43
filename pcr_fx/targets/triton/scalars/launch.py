"""Launches of the kernels that hold all numbers of a block in a thread's registers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pcr_fx.targets.kernel import LoweredBody
from pcr_fx.targets.triton.arguments import Arguments
from pcr_fx.targets.triton.launches import Launch, Loader
from pcr_fx.targets.triton.printer import HEADER
from pcr_fx.targets.triton.scalars.gradients import GradientsSource
from pcr_fx.targets.triton.scalars.newton import NewtonSource, words_of
from pcr_fx.targets.triton.scalars.sequential import SequentialSource
from pcr_fx.targets.triton.scalars.source import ScalarSource

# The largest d with a block, its operands and its Jacobian in one thread's registers: at one column a thread `newton` spills
# 0.3 kB at d = 6, and 1 kB at d = 8, after 65 s of compiling.
MAX_DIMENSION = 4
# By d and direction the columns of a slice, and the warps of its program: for chains of up to `FEW_SLICES` slices, and for
# longer ones, where sending corrections on, about 1 us a slice, takes longer than computing them. Measured on an H200,
# 1,024 to 65,536 blocks; none spills more than 64 bytes for sm_90 (`benchmarks.gpu_resources`).
SLICES = {
    (1, "forward"): ((1024, 8), (1024, 8)),
    (1, "adjoint"): ((1024, 8), (1024, 8)),
    (2, "forward"): ((128, 4), (1024, 8)),
    (2, "adjoint"): ((128, 4), (1024, 8)),
    (3, "forward"): ((128, 4), (512, 8)),
    (3, "adjoint"): ((128, 4), (512, 8)),
    (4, "forward"): ((128, 4), (512, 8)),
    (4, "adjoint"): ((128, 4), (256, 8)),
}
FEW_SLICES = 16
# Lanes of the other kernels, which are those of one warp: a sample in each, or a block.
_LANES = 32
_DIRECTIONS = ("forward", "adjoint")
_SOURCES: dict[str, type[ScalarSource]] = {
    "newton": NewtonSource,
    "sequential": SequentialSource,
    "gradients": GradientsSource,
}
NAMES = [(name, direction) for name in ("newton", "sequential") for direction in _DIRECTIONS]
NAMES.append(("gradients", "adjoint"))


def kernel_text(body: LoweredBody, name: str, direction: str) -> str:
    """The module of one of the kernels `NAMES`.

    Raises:
        Unprintable: the body has an op that cannot be printed, or is too large to be written out.
    """
    return HEADER + _SOURCES[name](body).text(direction)


class ScalarKernels:
    """The kernels of a body. All are printed here, so that what cannot be printed is known at once."""

    def __init__(self, body: LoweredBody) -> None:
        self.body, self._loader = body, Loader(partial(kernel_text, body))
        for name, direction in NAMES:
            kernel_text(body, name, direction)

    def solve_newton(
        self, direction: str, arguments: Arguments, result: Tensor, tolerance: float, max_iterations: int
    ) -> Tensor:
        """Newton's method for all samples, into `result` as from `solve`, in one launch.

        Returns:
            The stats `[samples, 3]` that `TritonKernel.solve_newton` describes.
        """
        samples, d, new = arguments.samples, self.body.dimension, arguments.initial.new_empty
        block, warps = self._slice(direction)
        programs = self._slices(direction) * samples
        stats = new((samples, 3))
        self._loader.kernel("newton", direction)[(programs,)](
            arguments.packed,
            *arguments.shared,
            arguments.initial,
            result,
            new((programs, d, block)),
            *self._messages(arguments.initial, programs, max_iterations),
            stats,
            self.body.program.length,
            samples,
            tolerance,
            max_iterations,
            BLOCK=block,
            num_warps=warps,
        )
        return stats

    def solve(self, direction: str, arguments: Arguments, result: Tensor, stats: Tensor | None) -> None:
        """All samples block by block, or those that `stats` says were not solved.

        Args:
            result: the trajectory `[L, *batch, d]`, or the adjoints `[L + 1, *batch, d]`.
        """
        self._loader.kernel("sequential", direction)[(-(-arguments.samples // _LANES),)](
            *arguments.operands,
            *arguments.shared,
            arguments.initial,
            arguments.trajectory,
            arguments.cotangents,
            result,
            arguments.initial if stats is None else stats,  # not read, but Triton wants a pointer
            self.body.program.length,
            arguments.samples,
            int(stats is not None),
            BLOCK=_LANES,
            num_warps=1,
        )

    def gradients(self, arguments: Arguments, adjoints: Tensor, parts: Sequence[Tensor], group: int) -> None:
        """Those of what is differentiable, in parts that are to be summed."""
        self._loader.kernel("gradients", "adjoint")[(self.runs() * -(-arguments.samples // group),)](
            arguments.packed,
            *arguments.shared,
            arguments.initial,
            adjoints,
            *parts,
            self.body.program.length,
            arguments.samples,
            group,
            BLOCK=_LANES,
            num_warps=1,
        )

    def runs(self) -> int:
        """How many runs of blocks there are."""
        return -(-self.body.program.length // _LANES)

    def scratch_numbers(self, samples: int, iterations: int) -> int:
        """Numbers beside results: operands and states packed, adjoints; what slices hold and pass on in Newton's method."""
        d, columns = self.body.dimension, self._columns("adjoint")
        packed = sum(one.size * (samples if one.own else 1) for one in self.body.inputs if not one.shared)
        states = 3 * d * columns
        if iterations:
            states += max(self._numbers_of_slices(direction, iterations) for direction in _DIRECTIONS)
        return packed * columns + states * samples

    def _messages(self, like: Tensor, programs: int, iterations: int) -> list[Tensor]:
        """Memory for what programs send one another, zeroed, and for their tickets: corrections, ends, one number."""
        words = words_of(self.body.program.dtype)
        sizes = (iterations + 1) * programs * self.body.dimension * words, programs * 3 * words, 1
        # Each begins at a multiple of 16 bytes: Triton compiles a kernel anew where that changes.
        whole = [size + size % 2 for size in sizes]
        return list(torch.zeros(sum(whole), dtype=torch.int64, device=like.device).split(whole))

    def _numbers_of_slices(self, direction: str, iterations: int) -> int:
        """States of one sample, and what slices send: words of 64 bits for 32, corrections and how they ended."""
        d, (block, _) = self.body.dimension, self._slice(direction)
        return self._slices(direction) * (d * (block + 2 * (iterations + 1)) + 2 * 3)

    def launches(self) -> list[Launch]:
        """Every kernel, to be compiled without being run."""
        found = []
        for name, direction in NAMES:
            sizes = SLICES[self.body.dimension, direction] if name == "newton" else [(_LANES, 1)]
            function, dtype = self._loader.kernel(name, direction), self.body.program.dtype
            for block, warps in dict.fromkeys(sizes):
                found.append(Launch.of(f"{name}, {direction}", function, dtype, {"BLOCK": block}, warps))
        return found

    def _columns(self, direction: str) -> int:
        return self.body.program.length + (direction == "adjoint")

    def _slices(self, direction: str) -> int:
        return -(-self._columns(direction) // self._slice(direction)[0])

    def _slice(self, direction: str) -> tuple[int, int]:
        """Columns of a slice, a power of two, and warps of the program that holds it."""
        few, many = SLICES[self.body.dimension, direction]
        block, warps = few if self._columns(direction) <= FEW_SLICES * few[0] else many
        block = min(block, max(16, 1 << (self._columns(direction) - 1).bit_length()))
        return block, min(warps, max(1, block // 32))
