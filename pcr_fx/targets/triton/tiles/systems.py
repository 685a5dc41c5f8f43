"""Launches of what judges an iteration of Newton's method and solves its linear systems, by the kernels of `reduction`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pcr_fx.stopping import rounding_level
from pcr_fx.targets.triton.launches import Launch
from pcr_fx.targets.triton.tiles.source import TILE_BYTES
from pcr_fx.targets.triton.tiles.tiling import padded, warps_for

# Lanes of the program that judges a sample's iteration.
_JUDGING_LANES = 256
_JUDGING_WARPS = 4


@dataclass(frozen=True)
class LinearSystems:
    """Those of a chain with d numbers a sample.

    Args:
        dimension: d.
        dtype: of states and matrices.
    """

    dimension: int
    dtype: torch.dtype

    def judge(
        self, ratios: Tensor, stats: Tensor, history: Tensor, iteration: int, limit: int, tolerance: float
    ) -> None:
        """From the residuals of an iteration to what becomes of it.

        Args:
            ratios: `[2, samples, columns]`, relative to what each column computes, and to the terms of that.
            stats, history: `[samples, 3]` each, as `decide_sample` has them.
        """
        samples, columns = ratios.shape[1:]
        _reduction().decide[(samples,)](
            ratios,
            stats,
            history,
            columns,
            samples,
            iteration,
            limit,
            tolerance,
            **self._judged,
            num_warps=_JUDGING_WARPS,
        )

    def solver(
        self, backward: bool, jacobians: Tensor, residuals: Tensor, states: Tensor, stats: Tensor
    ) -> Callable[[], None]:
        """What corrects the states by the solution of the systems, each time that it is called.

        Args:
            backward: whether the matrices are the transposed Jacobians.
            jacobians: `[samples, columns, d, d]`.
            residuals: `[samples, columns, d]`.
            states: `[L, *batch, d]`, or `[L + 1, *batch, d]` of the adjoint.
            stats: samples that have an outcome in it are left alone.
        """
        reduction, d = _reduction(), self.dimension
        samples, columns = residuals.shape[:2]
        chunk, chunks = _chunks(columns)
        maps = jacobians.new_empty((samples, chunks - 1, d, d + 1))
        square, parts = self._square(backward), -(-(d + 1) // reduction.SLICE)

        def solve() -> None:
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

        return solve

    def scratch_numbers(self, columns: int) -> int:
        """Numbers of the maps, for each sample."""
        _, chunks = _chunks(columns)
        return (chunks - 1) * self.dimension * (self.dimension + 1)

    def launches(self) -> list[Launch]:
        """Every kernel, to be compiled without being run."""
        reduction, warps, dtype = _reduction(), self._warps, self.dtype
        found = [Launch.of("decide", reduction.decide, dtype, self._judged, _JUDGING_WARPS)]
        for direction in ("forward", "adjoint"):
            square = self._square(direction == "adjoint")
            sliced = {**square, "SLICE": reduction.SLICE}
            found.append(Launch.of(f"compose, {direction}", reduction.compose, dtype, sliced, warps["compose"], 2))
            applied = {**square, "WIDTH": self._width}
            found.append(Launch.of(f"apply, {direction}", reduction.apply, dtype, applied, warps["apply"]))
        return found

    # --- constants ------------------------------------------------------------------------------------------

    @cached_property
    def _judged(self) -> dict[str, Any]:
        return {"rounding": rounding_level(self.dtype), "BLOCK": _JUDGING_LANES}

    @cached_property
    def _warps(self) -> dict[str, int]:
        read = self._padded * self._width * self.dtype.itemsize
        return {"compose": min(max(self._padded // 16, 1), 4), "apply": warps_for(read)}

    @property
    def _width(self) -> int:
        """Columns of a matrix that `apply` reads at once."""
        return min(self._padded, TILE_BYTES // (self._padded * self.dtype.itemsize))

    @property
    def _padded(self) -> int:
        return max(padded(self.dimension), 16)  # the least that `tl.dot` takes

    def _square(self, backward: bool) -> dict[str, Any]:
        return {"D": self.dimension, "PADDED": self._padded, "TRANSPOSED": backward}


def _chunks(columns: int) -> tuple[int, int]:
    """Columns of a chunk, and chunks."""
    chunk = _reduction().chunk_of(columns)
    return chunk, -(-columns // chunk)


@cache
def _reduction() -> ModuleType:
    """Imported late, since Triton is only there where kernels are."""
    from pcr_fx.targets.triton.tiles import reduction

    return reduction
