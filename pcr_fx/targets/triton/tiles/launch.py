"""Launches of the kernels in which one program works on a block, and of Newton's method with them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pcr_fx.stopping import rounding_level
from pcr_fx.targets.triton.inputs import DECIDING_LANES, Arguments, iterations_sent
from pcr_fx.targets.triton.launches import Launch, Loader
from pcr_fx.targets.triton.tiles.printer import padded, warps_for
from pcr_fx.targets.triton.tiles.source import TILE_BYTES, Text, TileSource

# The largest d: a matrix of 128 x 128 float64 is what a program can still hold.
MAX_DIMENSION = 128
# Blocks that one program adds up the gradients of shared operands of, so that there are not as many parts as blocks.
_RUN = 8
_NAMES = [(name, direction) for name in ("linearise", "sequential") for direction in ("forward", "adjoint")]
_NAMES.append(("gradients", "adjoint"))


class TileKernels:
    """The kernels of a source. All are printed here, so that what cannot be printed is known at once."""

    def __init__(self, source: TileSource) -> None:
        self.source = source
        self._texts: dict[tuple[str, str], Text] = {name: source.text(*name) for name in _NAMES}
        self._loader = Loader(lambda name, direction: self._texts[name, direction].module)
        self._constants: dict[torch.device, Tensor] = {}

    def solve_newton(
        self, direction: str, arguments: Arguments, result: Tensor, tolerance: float, max_iterations: int
    ) -> Tensor:
        """Newton's method for all samples, into `result` as from `solve`; four launches an iteration.

        Returns:
            The stats `[samples, 3]` that `TritonKernel.solve_newton` describes.
        """
        backward, d, samples = direction == "adjoint", self.source.dimension, arguments.samples
        columns = self.source.program.length + backward
        stats = arguments.initial.new_full((samples, 3), -1.0)
        history = arguments.initial.new_full((samples, 3), float("inf"))
        jacobians = arguments.initial.new_empty((samples, columns, d, d))
        residuals = arguments.initial.new_empty((samples, columns, d))
        ratios = arguments.initial.new_empty((2, samples, columns))
        if backward:
            # The cotangents by themselves: adjoints have a scale from the start.
            assert arguments.cotangents is not None
            result[0].zero_()
            result[1:] = arguments.cotangents
        else:
            result.copy_(arguments.initial)
        limit = iterations_sent(direction, self.source.program.length, max_iterations)
        reduce = self._reduction(backward, arguments, columns, jacobians, residuals, result, stats)
        for iteration in range(limit + 1):
            self._run(
                ("linearise", direction),
                samples * columns,
                arguments,
                arguments.trajectory,
                arguments.cotangents,
                result,
                jacobians,
                residuals,
                ratios,
                stats,
            )
            self._decide(ratios, stats, history, columns, iteration, limit, tolerance)
            if iteration < limit:
                reduce()
        return stats

    def solve(self, direction: str, arguments: Arguments, result: Tensor, stats: Tensor | None) -> None:
        """All samples block by block, or those that `stats` says were not solved.

        Args:
            result: the trajectory `[L, *batch, d]`, or the adjoints `[L + 1, *batch, d]`.
        """
        self._run(
            ("sequential", direction),
            arguments.samples,
            arguments,
            arguments.trajectory,
            arguments.cotangents,
            result,
            arguments.initial if stats is None else stats,  # not read, but Triton wants a pointer
            extra=[int(stats is not None)],
        )

    def gradients(self, arguments: Arguments, adjoints: Tensor, parts: Sequence[Tensor], group: int) -> None:
        """Those of what is differentiable, in parts that are to be summed."""
        programs = self.tiles() * -(-arguments.samples // group)
        self._run(
            ("gradients", "adjoint"),
            programs,
            arguments,
            arguments.trajectory,
            adjoints,
            *parts,
            extra=[group, self._run_length],
        )

    def tiles(self) -> int:
        """Runs of blocks, each worked on by programs of its own for gradients."""
        return -(-self.source.program.length // self._run_length)

    def scratch_numbers(self, samples: int, iterations: int) -> int:
        """Numbers beside results: adjoints, what programs keep for themselves; for Newton's method linear systems."""
        d, columns = self.source.dimension, self.source.program.length + 1
        own = {name: 0 for name, _ in _NAMES}
        for (name, _), text in self._texts.items():
            own[name] = max(own[name], text.scratch)
        numbers = columns * d + max(own["sequential"], self.tiles() * own["gradients"])
        if iterations:
            _, chunks = _chunks(columns)
            numbers += columns * (d * (d + 1) + 2 + own["linearise"]) + (chunks - 1) * d * (d + 1)
        return samples * numbers

    def launches(self) -> list[Launch]:
        """Every kernel, to be compiled without being run."""
        dtype = self.source.program.dtype
        found = []
        for (name, direction), text in self._texts.items():
            function = self._loader.kernel(name, direction)
            found.append(Launch.of(f"{name}, {direction}", function, dtype, {}, text.warps))
        reduction, warps = _reduction(), self._warps
        judged = self._judged
        found.append(Launch.of("decide", reduction.decide, dtype, judged, 4))
        for direction in ("forward", "adjoint"):
            square = self._square(direction == "adjoint")
            sliced = {**square, "SLICE": reduction.SLICE}
            found.append(Launch.of(f"compose, {direction}", reduction.compose, dtype, sliced, warps["compose"], 2))
            applied = {**square, "WIDTH": self._width}
            found.append(Launch.of(f"apply, {direction}", reduction.apply, dtype, applied, warps["apply"]))
        return found

    # --- one launch each ------------------------------------------------------------------------------------

    def _run(
        self, name: tuple[str, str], programs: int, arguments: Arguments, *tensors: Any, extra: Sequence[int] = ()
    ) -> None:
        """A printed kernel, with memory for what its programs keep."""
        text = self._texts[name]
        scratch = arguments.initial.new_empty(programs * text.scratch)
        self._loader.kernel(*name)[(programs,)](
            *arguments.operands,
            *arguments.shared,
            self._constants_on(arguments.initial),
            arguments.initial,
            *tensors,
            scratch,
            self.source.program.length,
            arguments.samples,
            *extra,
            num_warps=text.warps,
            num_stages=1,
        )

    def _decide(
        self,
        ratios: Tensor,
        stats: Tensor,
        history: Tensor,
        columns: int,
        iteration: int,
        limit: int,
        tolerance: float,
    ) -> None:
        samples = len(stats)
        _reduction().decide[(samples,)](
            ratios, stats, history, columns, samples, iteration, limit, tolerance, **self._judged, num_warps=4
        )

    def _reduction(
        self,
        backward: bool,
        arguments: Arguments,
        columns: int,
        jacobians: Tensor,
        residuals: Tensor,
        states: Tensor,
        stats: Tensor,
    ) -> Any:
        """What corrects the states by the solution of the linear system, each time that it is called."""
        reduction, d, samples = _reduction(), self.source.dimension, arguments.samples
        chunk, chunks = _chunks(columns)
        maps = jacobians.new_empty((samples, chunks - 1, d, d + 1))
        square = self._square(backward)
        parts = -(-(d + 1) // reduction.SLICE)

        def reduce() -> None:
            if chunks > 1:
                reduction.compose[(samples * (chunks - 1) * parts,)](
                    jacobians,
                    residuals,
                    maps,
                    stats,
                    columns,
                    chunk,
                    chunks,
                    **square,
                    SLICE=reduction.SLICE,
                    num_warps=self._warps["compose"],
                    num_stages=2,
                )
            reduction.apply[(samples * chunks,)](
                jacobians,
                residuals,
                maps,
                states,
                stats,
                columns,
                samples,
                chunk,
                chunks,
                **square,
                WIDTH=self._width,
                num_warps=self._warps["apply"],
                num_stages=1,
            )

        return reduce

    # --- constants ------------------------------------------------------------------------------------------

    @cached_property
    def _judged(self) -> dict[str, Any]:
        return {"rounding": rounding_level(self.source.program.dtype), "BLOCK": DECIDING_LANES}

    @cached_property
    def _warps(self) -> dict[str, int]:
        tile = self._padded * self._width * self.source.program.dtype.itemsize
        return {"compose": min(max(self._padded // 16, 1), 4), "apply": warps_for(tile)}

    @property
    def _width(self) -> int:
        """Columns of a matrix that `apply` reads at once."""
        return min(self._padded, TILE_BYTES // (self._padded * self.source.program.dtype.itemsize))

    @property
    def _padded(self) -> int:
        return max(padded(self.source.dimension), 16)  # the least that `tl.dot` takes

    def _square(self, backward: bool) -> dict[str, Any]:
        return {"D": self.source.dimension, "PADDED": self._padded, "TRANSPOSED": backward}

    @cached_property
    def _run_length(self) -> int:
        """Blocks that one program of the gradients goes through."""
        return _RUN if any(self.source.program.differentiable_shared) else 1

    def _constants_on(self, like: Tensor) -> Tensor:
        if not self.source.constants:
            return like  # not read, but Triton wants a pointer
        if like.device not in self._constants:
            self._constants[like.device] = like.new_tensor(self.source.constants)
        return self._constants[like.device]


def _chunks(columns: int) -> tuple[int, int]:
    """Columns of a chunk, and chunks."""
    chunk = _reduction().chunk_of(columns)
    return chunk, -(-columns // chunk)


@cache
def _reduction() -> ModuleType:
    """Triton is only there where kernels are."""
    from pcr_fx.targets.triton import reduction

    return reduction
