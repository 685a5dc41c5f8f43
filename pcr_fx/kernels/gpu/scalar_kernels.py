"""Launches of the kernels that hold all numbers of a block in a thread's registers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from pcr_fx.kernels.gpu.inputs import DECIDING_LANES, Call, Input, iterations_sent
from pcr_fx.kernels.gpu.launches import Launch, Loader
from pcr_fx.kernels.gpu.source_scalars import ScalarSource

# The largest d with a block, its operands and its Jacobian in one thread's registers: at d = 8 and one column a thread
# `newton` spills 1.9 kB, after 72 s of compiling.
MAX_DIMENSION = 4
# By d and direction the columns that a program holds at once, and its warps: the most that does not spill
# for sm_90 (`benchmarks.gpu_resources`).
TILES = {
    (1, "forward"): (1024, 8),
    (1, "adjoint"): (1024, 8),
    (2, "forward"): (1024, 8),
    (2, "adjoint"): (1024, 8),
    (3, "forward"): (256, 8),
    (3, "adjoint"): (256, 8),
    (4, "forward"): (256, 8),
    (4, "adjoint"): (128, 4),
}
# From so many slices of columns on, and up to so many samples, each slice has a program of its own. Estimated and not yet
# measured: a slice costs some 1 us, three launches 8, and more samples fill a GPU with a program each.
SLICES_APART = 16
SAMPLES_APART = 64
# Lanes of one warp: a sample in each, or a block.
_LANES = 32
_DIRECTIONS = ("forward", "adjoint")
_NAMES = [(name, direction) for name in ("newton", "linearise", "sequential") for direction in _DIRECTIONS]
_NAMES += [("link", "forward"), ("correct", "forward"), ("gradients", "adjoint")]


class ScalarKernels:
    """The kernels of a source. All are printed here, so that what cannot be printed is known at once."""

    def __init__(self, source: ScalarSource) -> None:
        self.source, self._loader = source, Loader(source.text)
        for name, direction in _NAMES:
            source.text(name, direction)

    def solve_newton(
        self, direction: str, call: Call, result: Tensor, tolerance: float, max_iterations: int
    ) -> Tensor:
        """Newton's method for all samples, into `result` as from `solve`.

        Returns:
            The stats `[samples, 3]` that `GpuKernel.solve_newton` describes.
        """
        if self._is_apart(direction, call.samples):
            return self._solve_apart(direction, call, result, tolerance, max_iterations)
        return self._solve_at_once(direction, call, result, tolerance, max_iterations)

    def _solve_at_once(
        self, direction: str, call: Call, result: Tensor, tolerance: float, max_iterations: int
    ) -> Tensor:
        """All iterations in one launch."""
        stats = call.initial.new_empty((call.samples, 3))
        columns = self._columns(direction)
        states = call.initial.new_empty((2, call.samples, self.source.dimension, columns + 1))
        block, warps = self._tile(direction)
        self._loader.kernel("newton", direction)[(call.samples,)](
            call.packed,
            *call.shared,
            call.initial,
            result,
            states,
            stats,
            self.source.program.length,
            call.samples,
            tolerance,
            max_iterations,
            BLOCK=block,
            num_warps=warps,
        )
        return stats

    def _solve_apart(
        self, direction: str, call: Call, result: Tensor, tolerance: float, max_iterations: int
    ) -> Tensor:
        """Three launches an iteration, and a program for each slice."""
        samples, d, columns = call.samples, self.source.dimension, self._columns(direction)
        block, warps = self._tile(direction)
        slices = -(-columns // block)
        new = call.initial.new_empty
        maps, carries = new((samples, d * d + d, columns)), new((samples, d, slices))
        ratios, states = new((2, samples, slices)), new((samples, d, columns + 1))
        stats, history = new((samples, 3)).fill_(-1), new((samples, 3)).fill_(float("inf"))
        # Adjoints start from nothing, states from where the chain does.
        states.copy_(call.initial.reshape(samples, d, 1)) if direction == "forward" else states.zero_()
        programs, tile = (samples * slices,), {"BLOCK": block, "num_warps": warps}
        kernel, limit = self._loader.kernel, iterations_sent(direction, self.source.program.length, max_iterations)
        linking = {"SLICE": block, "BLOCK": min(block, DECIDING_LANES), "num_warps": warps}
        for iteration in range(limit + 1):
            kernel("linearise", direction)[programs](
                call.packed, *call.shared, call.initial, states, maps, ratios, stats,
                self.source.program.length, samples, **tile,
            )  # fmt: skip
            kernel("link", "forward")[(samples,)](
                maps, carries, ratios, stats, history, columns, samples, iteration, limit, tolerance, **linking
            )
            if iteration < limit:
                kernel("correct", "forward")[programs](states, maps, carries, stats, columns, **tile)
        found = states[:, :, 1:].permute(2, 0, 1)
        result.view(columns, samples, d).copy_(found if direction == "forward" else found.flip(0))
        return stats

    def solve(self, direction: str, call: Call, result: Tensor, stats: Tensor | None) -> None:
        """All samples block by block, or those that `stats` says were not solved.

        Args:
            result: the trajectory `[L, *batch, d]`, or the adjoints `[L + 1, *batch, d]`.
        """
        self._loader.kernel("sequential", direction)[(-(-call.samples // _LANES),)](
            *call.operands,
            *call.shared,
            call.initial,
            call.trajectory,
            call.cotangents,
            result,
            call.initial if stats is None else stats,  # not read, but Triton wants a pointer
            self.source.program.length,
            call.samples,
            int(stats is not None),
            BLOCK=_LANES,
            num_warps=1,
        )

    def gradients(self, call: Call, adjoints: Tensor, parts: Sequence[Tensor], group: int) -> None:
        """Those of what is differentiable, in parts that are to be summed."""
        self._loader.kernel("gradients", "adjoint")[(self.tiles() * -(-call.samples // group),)](
            call.packed,
            *call.shared,
            call.initial,
            adjoints,
            *parts,
            self.source.program.length,
            call.samples,
            group,
            BLOCK=_LANES,
            num_warps=1,
        )

    def tiles(self) -> int:
        """Slices of blocks, each worked on by programs of its own for gradients."""
        return -(-self.source.program.length // _LANES)

    def scratch_numbers(self, samples: int, solver: str) -> int:
        """Numbers beside results: operands and states packed, adjoints; for Newton's method states twice, or once and maps."""
        d, columns = self.source.dimension, self._columns("adjoint")
        packed = sum(one.size * (samples if one.own else 1) for one in self._inputs if not one.shared)
        own = 3 * d * columns
        if solver == "newton":
            own += 2 * d * (columns + 1)
            if any(self._is_apart(direction, samples) for direction in _DIRECTIONS):
                slices = -(-columns // min(self._tile(direction)[0] for direction in _DIRECTIONS))
                own += d * (d + 1) * columns + (d + 2) * slices
        return packed * columns + own * samples

    def launches(self) -> list[Launch]:
        """Every kernel, to be compiled without being run."""
        found = []
        for name, direction in _NAMES:
            block, warps = (_LANES, 1) if name in ("sequential", "gradients") else self._tile(direction)
            constants = {"BLOCK": block}
            if name == "link":
                constants = {"SLICE": block, "BLOCK": min(block, DECIDING_LANES)}
            function, dtype = self._loader.kernel(name, direction), self.source.program.dtype
            found.append(Launch.of(f"{name}, {direction}", function, dtype, constants, warps))
        return found

    @cached_property
    def _inputs(self) -> list[Input]:
        return self.source.inputs

    def _columns(self, direction: str) -> int:
        return self.source.program.length + (direction == "adjoint")

    def _is_apart(self, direction: str, samples: int) -> bool:
        """Whether each slice has a program of its own."""
        block, _ = self._tile(direction)
        return self._columns(direction) > (SLICES_APART - 1) * block and samples <= SAMPLES_APART

    def _tile(self, direction: str) -> tuple[int, int]:
        """Columns of a slice, which a program holds at once, a power of two, and its warps."""
        block, warps = TILES[self.source.dimension, direction]
        block = min(block, max(16, 1 << (self._columns(direction) - 1).bit_length()))
        return block, min(warps, max(1, block // 32))
