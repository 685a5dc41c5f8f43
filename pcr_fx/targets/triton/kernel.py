"""A chain solved on a GPU by fused kernels: Newton, block by block where it fails, adjoints and gradients.

Nothing waits for the GPU: whether Newton converged is read there, by the kernel that evaluates block by block what did
not, and on the host only when somebody asks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pcr_fx.body import Interface
from pcr_fx.body.isolation import isolated
from pcr_fx.body.sample import SampleBody, trace_sample
from pcr_fx.call import Call
from pcr_fx.codegen import Unprintable
from pcr_fx.stopping import adjoint_tolerance
from pcr_fx.targets.kernel import Input, LoweredBody, check_tensors
from pcr_fx.targets.triton.arguments import Arguments
from pcr_fx.targets.triton.launches import Launch
from pcr_fx.targets.triton.printer import REALS
from pcr_fx.targets.triton.scalars import launch as scalar_launch
from pcr_fx.targets.triton.scalars.launch import ScalarKernels
from pcr_fx.targets.triton.tiles import launch as tile_launch
from pcr_fx.targets.triton.tiles.launch import TileKernels

MAX_DIMENSION = tile_launch.MAX_DIMENSION
# Samples that one program of the gradient kernel adds up.
_GROUP = 16
# Reductions of an adjoint: one solves it, others refine it.
_ADJOINT_ITERATIONS = 4


@dataclass(eq=False)
class TritonKernel:
    """The Triton kernels of one program, compiled by Triton at the first call that needs them.

    Attributes:
        lowered: one block on one sample, which all kernels are printed from.
        kernels: of scalars where a block fits in a thread, else of tiles.
        failure: why they cannot be used after all.
    """

    kind: ClassVar[str] = "fused"
    queues: ClassVar[bool] = True

    lowered: LoweredBody
    kernels: ScalarKernels | TileKernels
    failure: str | None = None
    operations: tuple[int, int] | None = None

    @classmethod
    @isolated
    def of(cls, program: Interface) -> TritonKernel:
        """The kernels of `program`.

        Raises:
            BodyError, Unprintable: there are none; the message is the reason.
        """
        try:
            import triton  # noqa: F401
        except ImportError as error:
            raise Unprintable("Triton is not installed") from error
        check_tensors(program, REALS)
        body = trace_sample(program)
        if not 0 < body.dimension <= MAX_DIMENSION:
            raise Unprintable(f"a sample has {body.dimension} numbers; fused kernels take 1 to {MAX_DIMENSION}")
        if body.batch_dims != program.layout.batch_dims:
            raise Unprintable("samples do not lie apart in memory")
        lowered = LoweredBody(program, body)
        return cls(lowered, _kernels(lowered))

    @property
    def program(self) -> Interface:
        """The chain."""
        return self.lowered.program

    @property
    def body(self) -> SampleBody:
        """One block on one sample, as it was traced."""
        return self.lowered.body

    def solve(self, call: Call) -> Tensor:
        """The trajectory `[L, *batch, d]` block by block, in one launch."""
        arguments = Arguments(call)
        trajectory = self._empty(arguments)
        if arguments.samples:
            self.kernels.solve("forward", arguments, trajectory, None)
        return trajectory

    def solve_newton(
        self, call: Call, tolerance: float, max_iterations: int, fall_back: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The trajectory `[L, *batch, d]` by Newton's method, each sample on its own.

        Args:
            call: as for `solve`.
            tolerance, max_iterations: as the solver has them.
            fall_back: whether samples that did not converge are evaluated block by block then.

        Returns:
            The trajectory, and `[samples, 3]` on the device: outcome in the order of `Outcome`, iterations, relative
            residual of each sample.
        """
        arguments = Arguments(call)
        trajectory = self._empty(arguments)
        if not arguments.samples:
            return trajectory, arguments.initial.new_empty((0, 3))
        stats = self.kernels.solve_newton("forward", arguments, trajectory, tolerance, max_iterations)
        if fall_back:
            self.kernels.solve("forward", arguments, trajectory, stats)
        return trajectory, stats

    def solve_adjoint(
        self, call: Call, trajectory: Tensor, cotangents: Tensor, solver: str
    ) -> tuple[list[Tensor], Tensor | None]:
        """Cotangents `[d_initial, *d_operands, *d_shared]` of what is differentiable, in this order.

        Args:
            call: as for `solve`.
            trajectory: what `solve` returned, `[L, *batch, d]`.
            cotangents: of every state, `[L, *batch, d]`.
            solver: "newton", one transposed reduction, and block by block for samples where it is not accurate; or
                "sequential".

        Returns:
            The cotangents, and the stats of the reduction, as from `solve_newton`.
        """
        arguments = Arguments(call, trajectory, cotangents)
        initial = arguments.initial
        adjoints = initial.new_empty((self.program.length + 1, *initial.shape))
        if not arguments.samples:
            wanted = self._wanted(arguments)
            zeros = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for _, tensor in wanted]
            return [torch.empty_like(initial), *zeros], None
        stats = None
        if solver == "newton":
            tolerance = adjoint_tolerance(initial.dtype)
            stats = self.kernels.solve_newton("adjoint", arguments, adjoints, tolerance, _ADJOINT_ITERATIONS)
        self.kernels.solve("adjoint", arguments, adjoints, stats)
        return [adjoints[0], *self._gradients(arguments, adjoints)], stats

    def _empty(self, arguments: Arguments) -> Tensor:
        return arguments.initial.new_empty((self.program.length, *arguments.initial.shape))

    @property
    def is_one_launch(self) -> bool:
        """Whether all iterations of Newton's method are one launch."""
        return isinstance(self.kernels, ScalarKernels)

    def variant(self, samples: int) -> tuple[bool, ...]:
        """All numbers of samples have the same."""
        return ()

    def scratch_bytes(self, samples: int, iterations: int = 0) -> int:
        """Memory that a solve and its adjoint need beside their results, at the most.

        Args:
            iterations: the most that Newton's method may take; 0 for block by block.
        """
        most = max(iterations, _ADJOINT_ITERATIONS) if iterations else 0
        shapes = (self._parts(one, samples) for one in self.lowered.inputs if one.differentiable)
        parts = sum(math.prod(shape) for shape in shapes if shape[0] > 1)
        return (self.kernels.scratch_numbers(samples, most) + parts) * self.program.dtype.itemsize

    def launches(self) -> list[Launch]:
        """Every kernel, to be compiled without being run."""
        return self.kernels.launches()

    def _wanted(self, arguments: Arguments) -> list[tuple[Input, Tensor]]:
        """What has a gradient."""
        tensors = [*arguments.operands, *arguments.shared]
        return [pair for pair in zip(self.lowered.inputs, tensors, strict=True) if pair[0].differentiable]

    def _parts(self, one: Input, samples: int) -> tuple[int, int]:
        """The shape of a gradient in parts that are to be summed, one a program that adds some up."""
        length, runs, groups = self.program.length, self.kernels.runs(), -(-samples // _GROUP)
        return {
            (True, True): (runs, samples * one.size),
            (True, False): (1, length * samples * one.size),
            (False, True): (groups * runs, one.size),
            (False, False): (groups, length * one.size),
        }[one.own, one.shared]

    def _gradients(self, arguments: Arguments, adjoints: Tensor) -> list[Tensor]:
        wanted = self._wanted(arguments)
        parts = [adjoints.new_empty(self._parts(one, arguments.samples)) for one, _ in wanted]
        if parts:
            self.kernels.gradients(arguments, adjoints, parts, _GROUP)
        return [
            (part.sum(0) if part.shape[0] > 1 else part[0]).reshape(tensor.shape)
            for part, (_, tensor) in zip(parts, wanted, strict=True)
        ]


def _kernels(body: LoweredBody) -> ScalarKernels | TileKernels:
    if body.dimension <= scalar_launch.MAX_DIMENSION:
        try:
            return ScalarKernels(body)
        except Unprintable:
            pass  # too large to be written out, if nothing else; then tiles do, or say why not
    return TileKernels(body)
