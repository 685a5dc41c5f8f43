"""What every target's kernel of a chain is to the rooms above, and what every target prints it from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import ClassVar, Protocol

import torch
from torch import Tensor, fx

from pcr_fx.body import Interface, some_results
from pcr_fx.body.sample import SampleBody
from pcr_fx.call import Call
from pcr_fx.codegen import WHOLE, Function, Unprintable, lower


class Kernel(Protocol):
    """The compiled code of a whole chain. What else it can do is between a target and its ways.

    Attributes:
        kind: the report's word for kernels of this target.
        queues: whether calls return before the device is done with them.
        failure: why it cannot be used after all; `None` while it can.
    """

    kind: ClassVar[str]
    queues: ClassVar[bool]
    failure: str | None

    @property
    def program(self) -> Interface:
        """The chain."""

    @property
    def body(self) -> SampleBody:
        """One block of it on one sample."""

    @property
    def operations(self) -> tuple[int, int] | None:
        """Scalar operations of a block and sample, forward and backward; `None` where they are not counted."""

    def solve(self, call: Call) -> Tensor:
        """The trajectory `[L, *batch, d]`, block by block."""

    def variant(self, samples: int) -> tuple[bool, ...]:
        """Which of its code serves so many samples, where there is more than one."""

    def scratch_bytes(self, samples: int, iterations: int = 0) -> int:
        """Memory that a solve and its adjoint need beside their results, at the most.

        Args:
            iterations: the most that Newton's method may take; 0 for block by block.
        """


@dataclass(frozen=True)
class Input:
    """One operand, literal or shared operand of a lowered body.

    Attributes:
        name: unique in the body.
        size: numbers of a block, or of a block and sample.
        own: whether each sample has its own.
        shared: whether all blocks have the same.
        differentiable: whether it has a gradient that is wanted.
    """

    name: str
    size: int
    own: bool
    shared: bool
    differentiable: bool


@dataclass(frozen=True)
class Result:
    """A state or an output of a sample, among all numbers that a block computes of it.

    Attributes:
        offset, size: which numbers.
        dtype: what they are to be; a kernel computes in that of the state.
    """

    offset: int
    size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class LoweredBody:
    """One block on one sample in the language of kernels, with its derivatives.

    Args:
        program: the chain.
        body: one block of it on one sample.

    Raises, when a function is first asked for:
        Unprintable: the body has an op that no kernel is printed for.
    """

    program: Interface
    body: SampleBody

    @property
    def dimension(self) -> int:
        """d, the numbers of a sample's state."""
        return self.body.dimension

    @cached_property
    def inputs(self) -> list[Input]:
        """Operands, literals and shared operands, in the order of the functions' inputs."""
        program = self.program
        operands = len(program.signature.operands) + len(program.literals)
        literals = [False for _ in program.literals]
        needs = [*program.differentiable_operands, *literals, *program.differentiable_shared]
        nodes = [node for node in self.body.step.graph.nodes if node.op == "placeholder"]
        sizes = [node.meta["val"].numel() for node in nodes[1:]]
        inputs = zip(sizes, self.body.own, needs, strict=True)
        return [Input(f"in{i}", size, own, i >= operands, need) for i, (size, own, need) in enumerate(inputs)]

    @cached_property
    def results(self) -> list[Result]:
        """The states, then the outputs."""
        counts = self.program.layout.counts if self._holds_samples else [self.dimension]
        numbers = [(size, self.program.dtype) for size in counts]
        numbers += [(output.size, output.spec.dtype) for output in self.body.outputs]
        offsets = accumulate((size for size, _ in numbers), initial=0)
        return [Result(offset, size, dtype) for offset, (size, dtype) in zip(offsets, numbers, strict=False)]

    @property
    def _holds_samples(self) -> bool:
        """Whether a sample is what the chain's batch dimensions tell apart, and not several of these together."""
        return self.body.batch_dims == self.program.layout.batch_dims

    @cached_property
    def step(self) -> Function:
        """The next state and the outputs of a state and the inputs."""
        sums = [False, *(False for _ in self.body.outputs)]
        return lower(self.body.step.graph, self.body.step, [True, *self.body.own], sums)

    @cached_property
    def pullback(self) -> Function:
        """The cotangents of a state and of every differentiable input that is wanted, of a state, the inputs and the
        cotangents of a state and of all outputs that have any.
        """
        sums = [not one.own for one in self.inputs if one.differentiable]
        cotangents = [True, *(True for output in self.body.outputs if output.spec.is_differentiable)]
        varying = [True, *self.body.own, *cotangents]
        graph = self.body.pullback.graph
        if self.program.wanted is not None:
            graph = some_results(graph, self.program.wanted_results)
        return lower(graph, self.body.pullback, varying, [False, *sums])

    @cached_property
    def pull(self) -> Function:
        """The pullback to the state alone."""
        graph = fx.Graph()
        before, *_ = graph.graph_copy(self.body.pullback.graph, {})  # type: ignore[misc]
        graph.output([before])
        graph.eliminate_dead_code()
        return lower(graph, self.body.pullback, [True, *self.body.own, True], [False])


def as_real(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """An operand in the dtype that a kernel computes in; for what has to be exact in it, the kernel was checked."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def check_tensors(program: Interface, reals: dict[torch.dtype, str]) -> None:
    """Whether kernels can compute with the tensors of a program.

    Args:
        reals: the dtypes that there are kernels for.

    Raises:
        Unprintable: they cannot; the message says which tensor is in the way.
    """
    dtype, device = program.dtype, program.signature.states[0].device
    if dtype not in reals:
        raise Unprintable(f"kernels are generated for float32 and float64, and the state is {dtype}")
    for spec in (*program.signature.operands, *program.signature.shared):
        if spec.dtype != dtype and spec.dtype not in WHOLE:
            raise Unprintable(f"an operand is {spec.dtype} and the state {dtype}")
        if spec.device != device:
            raise Unprintable(f"an operand is on {spec.device} and the state on {device}")
