"""Launches of the kernels in which one program works on a block, and of Newton's method with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pcr_fx.targets.kernel import LoweredBody
from pcr_fx.targets.triton.arguments import Arguments
from pcr_fx.targets.triton.launches import Launch, Loader
from pcr_fx.targets.triton.tiles.gradients import GradientsSource
from pcr_fx.targets.triton.tiles.newton import LineariseSource
from pcr_fx.targets.triton.tiles.sequential import SequentialSource
from pcr_fx.targets.triton.tiles.source import Text, TileSource
from pcr_fx.targets.triton.tiles.systems import LinearSystems

# The largest d: a matrix of 128 x 128 float64 is what a program can still hold.
MAX_DIMENSION = 128
# Blocks of a run where gradients are summed over blocks: there are then not as many parts as blocks.
_RUN = 8
# Iterations that are sent to the GPU whether they are needed or not, since nobody waits to see: each is four launches, which
# cost some 1.1 us each where they find nothing to do. What chains need grows as the root of their length where rounding
# matters at all: 3 iterations for 1,024 blocks x + W2 tanh(W1 x), 18 for 65,536. An adjoint is solved by the first, and
# refined by the second.
_FEWEST_SENT = 12
_SENT_A_ROOT = 1 / 8
_SENT_BACKWARD = 2
_SOURCES: dict[str, type[TileSource]] = {
    "linearise": LineariseSource,
    "sequential": SequentialSource,
    "gradients": GradientsSource,
}
NAMES = [(name, direction) for name in ("linearise", "sequential") for direction in ("forward", "adjoint")]
NAMES.append(("gradients", "adjoint"))


def kernel_text(body: LoweredBody, name: str, direction: str) -> Text:
    """One of the kernels `NAMES`.

    Raises:
        Unprintable: the body has an op that cannot be printed.
    """
    return _SOURCES[name](body).text(direction)


class TileKernels:
    """The kernels of a body. All are printed here, so that what cannot be printed is known at once."""

    def __init__(self, body: LoweredBody) -> None:
        self.body = body
        self._texts: dict[tuple[str, str], Text] = {name: kernel_text(body, *name) for name in NAMES}
        self._systems = LinearSystems(body.dimension, body.program.dtype)
        self._loader = Loader(lambda name, direction: self._texts[name, direction].module)
        self._constants: dict[torch.device, Tensor] = {}

    def solve_newton(
        self, direction: str, arguments: Arguments, result: Tensor, tolerance: float, max_iterations: int
    ) -> Tensor:
        """Newton's method for all samples, into `result` as from `solve`; four launches an iteration.

        Returns:
            The stats `[samples, 3]` that `TritonKernel.solve_newton` describes.
        """
        backward, d, samples = direction == "adjoint", self.body.dimension, arguments.samples
        columns = self.body.program.length + backward
        stats = arguments.initial.new_full((samples, 3), -1.0)
        history = arguments.initial.new_full((samples, 3), float("inf"))
        jacobians = arguments.initial.new_empty((samples, columns, d, d))
        residuals = arguments.initial.new_empty((samples, columns, d))
        ratios = arguments.initial.new_empty((2, samples, columns))
        if backward:
            # From the cotangents by themselves, not from zeros, which would give the first residuals no scale.
            assert arguments.cotangents is not None
            result[0].zero_()
            result[1:] = arguments.cotangents
        else:
            result.copy_(arguments.initial)
        limit = _iterations_sent(direction, self.body.program.length, max_iterations)
        correct = self._systems.solver(backward, jacobians, residuals, result, stats)
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
            self._systems.judge(ratios, stats, history, iteration, limit, tolerance)
            if iteration < limit:
                correct()
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
        programs = self.runs() * -(-arguments.samples // group)
        self._run(
            ("gradients", "adjoint"),
            programs,
            arguments,
            arguments.trajectory,
            adjoints,
            *parts,
            extra=[group, self._run_length],
        )

    def runs(self) -> int:
        """How many runs of blocks there are."""
        return -(-self.body.program.length // self._run_length)

    def scratch_numbers(self, samples: int, iterations: int) -> int:
        """Numbers beside results: adjoints, what programs keep for themselves; for Newton's method linear systems."""
        d, columns = self.body.dimension, self.body.program.length + 1
        scratch = dict.fromkeys(_SOURCES, 0)
        for (name, _), text in self._texts.items():
            scratch[name] = max(scratch[name], text.scratch)
        numbers = columns * d + max(scratch["sequential"], self.runs() * scratch["gradients"])
        if iterations:
            numbers += columns * (d * (d + 1) + 2 + scratch["linearise"]) + self._systems.scratch_numbers(columns)
        return samples * numbers

    def launches(self) -> list[Launch]:
        """Every kernel, to be compiled without being run."""
        dtype = self.body.program.dtype
        found = []
        for (name, direction), text in self._texts.items():
            function = self._loader.kernel(name, direction)
            found.append(Launch.of(f"{name}, {direction}", function, dtype, {}, text.warps))
        return found + self._systems.launches()

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
            self.body.program.length,
            arguments.samples,
            *extra,
            num_warps=text.warps,
            num_stages=1,
        )

    @cached_property
    def _run_length(self) -> int:
        """Blocks of a run."""
        return _RUN if any(self.body.program.differentiable_shared) else 1

    @cached_property
    def _values(self) -> list[float]:
        """Constants of the body."""
        return SequentialSource(self.body).constants

    def _constants_on(self, like: Tensor) -> Tensor:
        if not self._values:
            return like  # not read, but Triton wants a pointer
        if like.device not in self._constants:
            self._constants[like.device] = like.new_tensor(self._values)
        return self._constants[like.device]


def _iterations_sent(direction: str, length: int, limit: int) -> int:
    """How many iterations to send of at most `limit`."""
    if direction == "adjoint":
        return min(limit, _SENT_BACKWARD)
    return min(limit, max(_FEWEST_SENT, math.ceil(_SENT_A_ROOT * math.sqrt(length))))
