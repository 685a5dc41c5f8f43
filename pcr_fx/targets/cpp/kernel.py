"""A chain evaluated block by block in one native call, forward and backward."""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from pcr_fx.body import Interface
from pcr_fx.body.isolation import isolated
from pcr_fx.body.sample import SampleBody, trace_sample
from pcr_fx.call import Call
from pcr_fx.codegen import Unprintable
from pcr_fx.locks import fork_safe_lock
from pcr_fx.stopping import Outcome
from pcr_fx.targets.cpp.build import CompilerError, check_compiler, load
from pcr_fx.targets.cpp.launches import Launch, Run, gradient_shapes
from pcr_fx.targets.cpp.memory import empty
from pcr_fx.targets.cpp.results import Words, cotangent_words
from pcr_fx.targets.cpp.source import REALS, WHOLE, chain_source, summed_numbers
from pcr_fx.targets.cpp.threads import Team, available_threads
from pcr_fx.targets.kernel import LoweredBody, check_tensors

log = logging.getLogger(__name__)

# Scalar operations of a whole call below which a second thread costs more than it saves.
_OPERATIONS_A_THREAD = 2_000_000
# Bytes of a vector, as in numbers.h: here they only decide what is worth it.
_VECTOR_BYTES = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 16)
# Samples from which on a vector of samples is filled well enough to beat vectors of one sample's features, by its lanes.
_VECTOR_SAMPLES = {16: 6, 8: 4, 4: 3, 2: 2}
# Bytes that a block may hold on the stack: a small part of what threads have, which is not asked for. Vectors of samples
# hold one in place of each number.
_STACK_BYTES = 2**19
# Numbers of per-block gradients up to which the sums over samples, a whole vector each, stay in the nearest cache.
_VECTOR_GRADIENTS = 512
# Those of gradients that all blocks share up to which they stay in the second cache. A vector that samples do not fill
# has them copied at every block: with 8 samples that is slower from 1,000 numbers on, three times so at 4,000.
_VECTOR_SHARED = 2**15

# Whose gradients are wanted, of operands and shared operands; `None` for all that have any.
Wanted = tuple[bool, ...] | None
# Launches that a kernel keeps, of directions and sizes.
_LAUNCHES = 256


class Scattered(Protocol):
    """The parts of a per-block operand, each somewhere in memory."""

    @property
    def words(self) -> tuple[int, int, int]:
        """0, 0 and the address of a table of the parts' addresses."""


@dataclass(eq=False)
class CppKernel:
    """The native code of one program. Libraries are compiled at the first call that needs them.

    Attributes:
        lowered: one block on one sample, which all code is printed from.
        operations: scalar operations of a block and sample, forward and backward.
        held: numbers that a block and sample hold on the stack.
        summed: numbers of gradients that are sums over samples: of matrices, of what else a block has for itself, and of
            what else all blocks share.
        failure: why one of its libraries could not be compiled.
    """

    kind: ClassVar[str] = "native"
    queues: ClassVar[bool] = False

    lowered: LoweredBody
    operations: tuple[int, int]
    held: int
    summed: tuple[int, int, int]
    failure: str | None = None
    _runs: dict[tuple[str, bool, bool, Wanted], Run | None] = field(default_factory=dict)
    _launches: dict[tuple[str, int, torch.Size, Wanted], Launch] = field(default_factory=dict)
    _bodies: dict[Wanted, LoweredBody] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=fork_safe_lock)
    _team: Team = field(default_factory=Team)

    @classmethod
    def of(cls, program: Interface) -> CppKernel:
        """The kernel of `program`; it computes the outputs too that its blocks return.

        Raises:
            BodyError, Unprintable, CompilerError: there is none; the message is the reason.
        """
        device = program.signature.states[0].device
        if device.type != "cpu":
            raise Unprintable(f"kernels are generated for the CPU, and the chain is on {device}")
        check_tensors(program, REALS)
        if program.dimension == 0:
            raise Unprintable("the state has no numbers")
        check_compiler()
        lowered = LoweredBody(program, trace_sample(program))
        for output in lowered.body.outputs:
            if output.spec.dtype not in (program.dtype, *WHOLE):
                raise Unprintable(f"an output is {output.spec.dtype} and the state {program.dtype}")
        step, pullback = lowered.step, lowered.pullback
        own = sum(one.size for one in lowered.inputs if one.own)
        # What the functions hold, and the headers around them: states, adjoints, a sample's own inputs and gradients.
        given = sum(one.size for one in lowered.results)
        held = max(step.memory, pullback.memory) + lowered.dimension + 2 * given + 2 * own
        if held * program.dtype.itemsize > _STACK_BYTES:
            raise Unprintable(f"a block holds {held} numbers of a sample at a time, which is too many for the stack")
        operations = (step.operations, pullback.operations)
        return cls(lowered, operations, held, summed_numbers(lowered))

    @property
    def program(self) -> Interface:
        """The chain."""
        return self.lowered.program

    @property
    def body(self) -> SampleBody:
        """One block on one sample, as it was traced."""
        return self.lowered.body

    def variant(self, samples: int) -> tuple[bool, ...]:
        """Whether they are the lanes of vectors, forward and backward."""
        return not self.why_features("forward", samples), not self.why_features("adjoint", samples)

    def scratch_bytes(self, samples: int, iterations: int = 0) -> int:
        """None: what a block holds is on the stack."""
        return 0

    def is_ready(self, direction: str, initial: Tensor, wanted: Wanted = None) -> bool:
        """Whether the kernel for states like `initial` can be called; it is compiled now, if it is not yet.

        Args:
            direction: "forward" or "adjoint", block by block; or "newton", forward.
            wanted: whose gradients an adjoint is to compute.
        """
        if direction == "newton" and self.body.batch_dims != self.program.layout.batch_dims:
            return False  # its d is that of several samples, which do not depend on each other
        if direction == "newton" and not self._vectors_fit:
            return False  # it puts a row of a Jacobian in each lane
        return self._run(direction, self._samples(initial.shape), wanted) is not None

    def feeds(self, direction: str, samples: int, length: int | None = None) -> int:
        """How many threads the work of all blocks feeds, and PyTorch may use; where lanes are samples, each has a vector.

        Args:
            direction: "forward" or "adjoint".
            length: of how many blocks; `None` for those of the program.
        """
        operations = self.operations[direction == "adjoint"] * (length or self.program.length) * samples
        tiles = samples if self.why_features(direction, samples) else -(-samples // self._lanes)
        return max(1, min(available_threads(), tiles, operations // _OPERATIONS_A_THREAD))

    def solve(self, call: Call, threads: int | None = None) -> Tensor:
        """The trajectory `[L, *batch, d]`, block by block.

        Args:
            threads: as many as may be used; `None` for as many as the work feeds.
        """
        initial = call.initial.contiguous()
        trajectory = empty(initial, (call.length, *initial.shape))
        self._launch("forward", call.length, initial.shape).forward(call, initial, trajectory, threads=threads)
        return trajectory

    def solve_states(self, call: Call, blocks: tuple[int, ...], threads: int | None = None) -> Sequence[Tensor]:
        """The states `[*batch, d]` of some blocks, in order. No memory is taken for those of others.

        Args:
            blocks: their numbers, in order.
            threads: as for `solve`.
        """
        initial = call.initial.contiguous()
        # One state alone is not to be a view, which remembers that it was made without gradients.
        made = empty(initial, initial.shape if len(blocks) == 1 else (len(blocks), *initial.shape))
        rows = _rows(blocks, call.length)
        self._launch("forward", call.length, initial.shape).forward(call, initial, made, rows, threads=threads)
        return (made,) if len(blocks) == 1 else made.unbind(0)

    def sweep(
        self,
        call: Call,
        results: Sequence[Words],
        threads: int | None = None,
        keeps: bool = True,
        blocks: tuple[int, ...] = (),
    ) -> Tensor | None:
        """As `solve`, writing states and outputs in memory of others on the way.

        Args:
            results: where each state, then each output of the body is to be; `NOWHERE` where nobody wants it.
            threads: as for `solve`.
            keeps: whether the trajectory is wanted beside them.
            blocks: the numbers, in order, of those after which the states are wanted, where the trajectory is not.
        """
        initial = call.initial.contiguous()
        count = call.length if keeps else len(blocks)
        made = empty(initial, (count, *initial.shape)) if count else None
        rows = None if keeps or made is None else _rows(blocks, call.length)
        self._launch("forward", call.length, initial.shape).forward(call, initial, made, rows, results, threads)
        return made

    def batch_dims_of(self, result: int) -> tuple[int, ...]:
        """Which dimensions of a state or an output, counted behind the states, tell samples apart."""
        states = len(self.lowered.results) - len(self.body.outputs)
        return self.body.batch_dims if result < states else self.body.outputs[result - states].batch_dims

    def solve_newton(self, call: Call, tolerance: float, max_iterations: int) -> tuple[Tensor, str, int, float]:
        """The trajectory `[L, *batch, d]` by Newton's method, each sample on its own.

        Args:
            call: of at least one sample.
            tolerance, max_iterations: as the solver has them.

        Returns:
            The trajectory; the name of the outcome, the iterations and the relative residual: the worst of all samples,
            or those of the first that failed, after which others may not have been solved.
        """
        initial = call.initial.contiguous()
        trajectory = empty(initial, (call.length, *initial.shape))
        iteration = (ctypes.c_double * 5)(tolerance, max_iterations)
        self._launch("newton", call.length, initial.shape).newton(call, initial, trajectory, iteration)
        _, _, iterations, residual, outcome = iteration
        return trajectory, list(Outcome)[int(outcome)].name, int(iterations), residual

    def solve_adjoint(
        self,
        call: Call,
        trajectory: Tensor,
        cotangents: Tensor | Mapping[int, Tensor],
        threads: int | None = None,
        results: Sequence[Tensor | Mapping[int, Tensor] | None] = (),
        wanted: Wanted = None,
    ) -> list[Tensor]:
        """Cotangents `[d_initial, *d_operands, *d_shared]` of what is differentiable and wanted, in this order.

        Args:
            call: as for `solve`.
            trajectory: what `solve` returned.
            cotangents: of every state, `[L, *batch, d]`; or of some, `[*batch, d]` by block.
            threads: as for `solve`.
            results: cotangents of each state and output that `sweep` wrote, `[L, ...]`; or of some blocks' parts.
            wanted: whose gradients are computed; the code for it is compiled when it is first asked for.
        """
        initial, trajectory = call.initial.contiguous(), trajectory.contiguous()
        told = [
            cotangent_words(one, self.batch_dims_of(index), self.lowered.results[index].size, call.length)
            for index, one in enumerate(results)
        ]
        words = [words for words, _ in told]
        launch = self._launch("adjoint", call.length, initial.shape, wanted)
        return launch.adjoint(call, initial, trajectory, cotangents, words, threads)

    @property
    def _vectors_fit(self) -> bool:
        """Whether the stack has room for a vector in place of each number."""
        return self.held * _VECTOR_BYTES <= _STACK_BYTES

    def _samples(self, shape: Sequence[int]) -> int:
        numbers = math.prod(shape)
        assert numbers % self.body.dimension == 0, "another kernel is for this state"
        return numbers // self.body.dimension

    def _launch(self, direction: str, length: int, shape: torch.Size, wanted: Wanted = None) -> Launch:
        """What calls of so many blocks, with an initial state of this shape, have in common."""
        key = direction, length, shape, wanted
        return self._launches.get(key) or self._prepared(*key)

    def _body_for(self, wanted: Wanted) -> LoweredBody:
        """What code is printed from that computes these gradients."""
        if wanted is None:
            return self.lowered
        if wanted not in self._bodies:
            self._bodies[wanted] = LoweredBody(self.program.wanting(wanted), self.body)
        return self._bodies[wanted]

    def _prepared(self, direction: str, length: int, shape: torch.Size, wanted: Wanted) -> Launch:
        samples, body = self._samples(shape), self._body_for(wanted)
        run = self._run(direction, samples, wanted)
        assert run is not None, "a kernel that is not ready is not called"
        operations = self.operations[direction != "forward"]
        if direction == "newton":
            operations *= self.program.dimension
        feeds = max(1, operations * length * samples // _OPERATIONS_A_THREAD)
        batch = shape[: len(self.body.batch_dims)]
        gradients = gradient_shapes(body, length, batch) if direction == "adjoint" else ()
        made = Launch(run, body, (direction, length, samples), feeds, self._team, gradients)
        self._launches[direction, length, shape, wanted] = made
        if len(self._launches) > _LAUNCHES:
            self._launches.pop(next(iter(list(self._launches))), None)  # other threads may be at it, too
        return made

    def _run(self, direction: str, samples: int, wanted: Wanted = None) -> Run | None:
        """The compiled function for this many samples; `None` where it cannot be had."""
        vectors = direction != "newton" and not self.why_features(direction, samples)
        key = direction, vectors, direction == "adjoint" and samples == 1 and not vectors, wanted
        if key not in self._runs:
            with self._lock:
                if key not in self._runs:
                    self._runs[key] = self._built(*key)
        return self._runs[key]

    def vectors(self, samples: int) -> int:
        """How many vectors of samples there are, if lanes are samples in both directions; else 0."""
        return 0 if self.why_features("adjoint", samples) else -(-samples // self._lanes)

    def why_features(self, direction: str, samples: int) -> str:
        """Why the lanes of vectors are features of one sample; nothing where each is a sample.

        Args:
            direction: "forward" or "adjoint".
        """
        least = _VECTOR_SAMPLES[self._lanes]
        if samples < least:
            return f"there are fewer than {least} samples"
        if not self._vectors_fit:
            return "a block is too wide for vectors of samples"
        filled = samples % self._lanes == 0 or samples >= 4 * self._lanes
        matrices, own, shared = self.summed
        fit = own <= _VECTOR_GRADIENTS + matrices and shared <= (_VECTOR_SHARED if filled else _VECTOR_GRADIENTS)
        return "" if fit or direction == "forward" else "gradients are too large to be summed in vectors of samples"

    @property
    def _lanes(self) -> int:
        return _VECTOR_BYTES // self.program.dtype.itemsize

    @isolated
    def _built(self, direction: str, vectors: bool, alone: bool, wanted: Wanted) -> Run | None:
        try:
            return load(chain_source(self._body_for(wanted), direction, vectors, alone, self._vectors_fit)).run
        except CompilerError as error:
            if self.failure is None:
                log.warning("%s; the chain runs in PyTorch's ops instead", error)
            self.failure = str(error)
            return None


@functools.lru_cache(maxsize=16)
def _rows(wanted: tuple[int, ...], length: int) -> Tensor:
    """For native code: the place of each block's state among those that are wanted, or -1."""
    rows = torch.full((length,), -1, dtype=torch.int64, device="cpu")
    for row, block in enumerate(wanted):
        rows[block] = row
    return rows
