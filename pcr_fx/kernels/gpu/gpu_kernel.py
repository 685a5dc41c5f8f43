"""A chain solved on a GPU by fused kernels: Newton, block by block where it fails, adjoints and gradients.

Nothing waits for the GPU: whether Newton converged is read there, by the kernel that evaluates block by block what did
not, and on the host only when somebody asks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pcr_fx.body import Program
from pcr_fx.body.isolation import isolated
from pcr_fx.body.sample import SampleBody, trace_sample
from pcr_fx.codegen import Unprintable
from pcr_fx.kernels.gpu import scalar_kernels, tile_kernels
from pcr_fx.kernels.gpu.inputs import REALS, Call, Input
from pcr_fx.kernels.gpu.launches import Launch
from pcr_fx.kernels.gpu.scalar_kernels import ScalarKernels
from pcr_fx.kernels.gpu.source_scalars import ScalarSource
from pcr_fx.kernels.gpu.source_tiles import TileSource
from pcr_fx.kernels.gpu.tile_kernels import TileKernels
from pcr_fx.kernels.source import differentiable

MAX_DIMENSION = tile_kernels.MAX_DIMENSION
# Samples that one program of the gradient kernel adds up.
_GROUP = 16
# Accepted residual of an adjoint, in epsilons: as in pcr_fx/solvers/adjoint.py.
_ADJOINT_EPS = 32.0
_ADJOINT_ITERATIONS = 4


@dataclass(eq=False)
class GpuKernel:
    """The Triton kernels of one program, compiled by Triton at the first call that needs them.

    Attributes:
        program, body: the chain, and one block of it on one sample.
        kernels: of scalars where a block fits in a thread, else of tiles.
        failure: why they cannot be used after all.
    """

    program: Program
    body: SampleBody
    kernels: ScalarKernels | TileKernels
    failure: str | None = None

    @classmethod
    @isolated
    def of(cls, program: Program) -> GpuKernel:
        """The kernels of `program`.

        Raises:
            BodyError, Unprintable: there are none; the message is the reason.
        """
        try:
            import triton  # noqa: F401
        except ImportError as error:
            raise Unprintable("Triton is not installed") from error
        dtype = program.dtype
        if dtype not in REALS:
            raise Unprintable(f"kernels are generated for float32 and float64, and the state is {dtype}")
        for spec in (*program.signature.operands, *program.signature.shared):
            if spec.dtype != dtype:
                raise Unprintable(f"an operand is {spec.dtype} and the state {dtype}")
        body = trace_sample(program)
        if not 0 < body.dimension <= MAX_DIMENSION:
            raise Unprintable(f"a sample has {body.dimension} numbers; fused kernels take 1 to {MAX_DIMENSION}")
        if body.batch_dims != program.layout.batch_dims:
            raise Unprintable("samples do not lie apart in memory")
        return cls(program, body, _kernels(program, body))

    def solve(self, initial: Tensor, operands: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        """The trajectory `[L, *batch, d]` block by block, in one launch.

        Args:
            initial: `[*batch, d]`.
            operands: those of the chain, then its literals, each `[L, ...]`.
            shared: shared operands.
        """
        call = Call(initial, operands, shared)
        trajectory = call.initial.new_empty((self.program.length, *initial.shape))
        if call.samples:
            self.kernels.solve("forward", call, trajectory, None)
        return trajectory

    def solve_newton(
        self,
        initial: Tensor,
        operands: Sequence[Tensor],
        shared: Sequence[Tensor],
        tolerance: float,
        max_iterations: int,
        fall_back: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The trajectory `[L, *batch, d]` by Newton's method, each sample on its own.

        Args:
            initial, operands, shared: as for `solve`.
            tolerance, max_iterations: as the solver has them.
            fall_back: whether samples that did not converge are evaluated block by block then.

        Returns:
            The trajectory, and `[samples, 3]` on the device: outcome in the order of `Outcome`, iterations, relative
            residual of each sample.
        """
        call = Call(initial, operands, shared)
        trajectory = call.initial.new_empty((self.program.length, *initial.shape))
        if not call.samples:
            return trajectory, call.initial.new_empty((0, 3))
        stats = self.kernels.solve_newton("forward", call, trajectory, tolerance, max_iterations)
        if fall_back:
            self.kernels.solve("forward", call, trajectory, stats)
        return trajectory, stats

    def solve_adjoint(
        self,
        initial: Tensor,
        trajectory: Tensor,
        operands: Sequence[Tensor],
        shared: Sequence[Tensor],
        cotangents: Tensor,
        solver: str,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Cotangents `[d_initial, *d_operands, *d_shared]` of what is differentiable, in this order.

        Args:
            initial, operands, shared: as for `solve`.
            trajectory: what `solve` returned, `[L, *batch, d]`.
            cotangents: of every state, `[L, *batch, d]`.
            solver: "newton", one transposed reduction, and block by block for samples where it is not accurate; or
                "sequential".

        Returns:
            The cotangents, and the stats of the reduction, as from `solve_newton`.
        """
        call = Call(initial, operands, shared, trajectory, cotangents)
        adjoints = call.initial.new_empty((self.program.length + 1, *initial.shape))
        if not call.samples:
            wanted = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for _, tensor in self._wanted(call)]
            return [torch.empty_like(call.initial), *wanted], None
        stats = None
        if solver == "newton":
            tolerance = _ADJOINT_EPS * torch.finfo(initial.dtype).eps
            stats = self.kernels.solve_newton("adjoint", call, adjoints, tolerance, _ADJOINT_ITERATIONS)
        self.kernels.solve("adjoint", call, adjoints, stats)
        return [adjoints[0], *self._gradients(call, adjoints)], stats

    @property
    def is_one_launch(self) -> bool:
        """Whether all iterations of Newton's method are one launch."""
        return isinstance(self.kernels, ScalarKernels)

    def scratch_bytes(self, samples: int, iterations: int = 0) -> int:
        """Memory that a solve and its adjoint need beside their results, at the most.

        Args:
            iterations: the most that Newton's method may take; 0 for block by block.
        """
        most = max(iterations, _ADJOINT_ITERATIONS) if iterations else 0
        shapes = (self._parts(one, samples) for one, need in self._inputs() if need)
        parts = sum(math.prod(shape) for shape in shapes if shape[0] > 1)
        return (self.kernels.scratch_numbers(samples, most) + parts) * self.program.dtype.itemsize

    def launches(self) -> list[Launch]:
        """Every kernel, to be compiled without being run."""
        return self.kernels.launches()

    def _wanted(self, call: Call) -> list[tuple[Input, Tensor]]:
        """What has a gradient."""
        tensors = [*call.operands, *call.shared]
        return [(one, tensor) for (one, need), tensor in zip(self._inputs(), tensors, strict=True) if need]

    def _inputs(self) -> list[tuple[Input, bool]]:
        """Operands and shared operands, and whether they have gradients."""
        return list(zip(self.kernels.source.inputs, differentiable(self.program), strict=True))

    def _parts(self, one: Input, samples: int) -> tuple[int, int]:
        """The shape of a gradient in parts that are to be summed, one a program that adds some up."""
        length, tiles, groups = self.program.length, self.kernels.tiles(), -(-samples // _GROUP)
        return {
            (True, True): (tiles, samples * one.size),
            (True, False): (1, length * samples * one.size),
            (False, True): (groups * tiles, one.size),
            (False, False): (groups, length * one.size),
        }[one.own, one.shared]

    def _gradients(self, call: Call, adjoints: Tensor) -> list[Tensor]:
        wanted = self._wanted(call)
        parts = [adjoints.new_empty(self._parts(one, call.samples)) for one, _ in wanted]
        if parts:
            self.kernels.gradients(call, adjoints, parts, _GROUP)
        return [
            (part.sum(0) if part.shape[0] > 1 else part[0]).reshape(tensor.shape)
            for part, (_, tensor) in zip(parts, wanted, strict=True)
        ]


def _kernels(program: Program, body: SampleBody) -> ScalarKernels | TileKernels:
    if body.dimension <= scalar_kernels.MAX_DIMENSION:
        try:
            return ScalarKernels(ScalarSource(program, body))
        except Unprintable:
            pass  # too large to be written out, if nothing else; then tiles do, or say why not
    return TileKernels(TileSource(program, body))
