"""A body for one sample: what kernels are generated from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from pcr_fx.body.batch import prove_batch_dimensions
from pcr_fx.body.decompositions import DECOMPOSITIONS
from pcr_fx.body.isolation import isolated
from pcr_fx.body.layout import StateLayout
from pcr_fx.body.program import Interface, Program
from pcr_fx.body.reals import by_parts, holds_complex
from pcr_fx.body.signature import Generality, Signature
from pcr_fx.body.tracer import Run, Tracer, trace, trace_block
from pcr_fx.chain import TensorSpec
from pcr_fx.errors import BodyError
from pcr_fx.graphs.nodes import is_mutable
from pcr_fx.graphs.parts import holds_derivatives

# Inputs that may or may not have a part for each sample: tried in all ways, up to this many of them.
_MAX_CANDIDATES = 4


@dataclass(frozen=True)
class SampleOutput:
    """One output of a block.

    Attributes:
        spec: as the block has it.
        batch_dims: which of its dimensions are those that tell samples apart.
        size: numbers a sample.
    """

    spec: TensorSpec
    batch_dims: tuple[int, ...]
    size: int


@dataclass(frozen=True, eq=False)
class SampleBody:
    """One block of a program on one sample, as aten graphs of few ops, none of which writes in place.

    Attributes:
        batch_dims: those of the program's batch dimensions that tell samples apart here: the first ones, all if possible.
            What acts on each number alone may still have parameters for each feature.
        dimension: numbers a sample.
        own: for each per-block operand, literal and shared operand whether samples have their own; all samples use the
            others as they are.
        step: `(z, *operands, *literals, *shared) -> z`, or `(z, *outputs)` where there are any, every size of the batch 1.
        pullback: `(z, *operands, *literals, *shared, *cotangents) -> (dz, *d_operands, *d_shared)`, from those of the state
            and of the floating outputs.
        outputs: of the chain, where its body returns any.
    """

    batch_dims: tuple[int, ...]
    dimension: int
    own: tuple[bool, ...]
    step: fx.GraphModule
    pullback: fx.GraphModule
    outputs: tuple[SampleOutput, ...] = ()

    def bound_to(self, program: Program) -> tuple[int, ...] | Signature:
        """The sizes beside those that `program` fixes for which alone this is right.

        Args:
            program: what it was traced of, for the signature that it was traced at.

        Returns:
            Those of the batch dimensions that do not tell samples apart here; or all, where it cannot be told how
            operands follow the others.
        """
        if not program.generality.any_batch:
            return ()
        free, first = len(self.batch_dims), program.signature.states[0]
        operands, literals = program.chain.num_operands, len(program.chain.literals)
        owns = [*self.own[:operands], *self.own[operands + literals :]]
        samples = tuple((dim, dim) for dim in range(free))
        for pairs, own in zip(program.generality.follows, owns, strict=True):
            if tuple(pair for pair in pairs if pair[1] < free) != (samples if own else ()):
                return program.signature
        return tuple(first.shape[dim] for dim in program.layout.batch_dims[free:])


@isolated
def trace_sample(program: Interface) -> SampleBody:
    """The body of `program` for one sample.

    Raises:
        BodyError: it only is right for the batch size that it was traced with.
    """
    failure: BodyError | None = None
    for batch_dims in _batches(program):
        for own in _candidates(program, batch_dims):
            try:
                places = _places_of_outputs(program, batch_dims, own)
                return _trace_sample(program, batch_dims, own, places)
            except BodyError as reason:
                failure = failure or reason
    assert failure is not None, "there is always something to try"
    raise failure


def _batches(program: Interface) -> Iterator[tuple[int, ...]]:
    """Which dimensions may tell samples apart: such that a sample lies together in memory where it does now."""
    dims = program.layout.batch_dims
    yield dims
    if program.chain.num_states == 1 and dims == tuple(range(len(dims))):
        yield from (dims[:count] for count in range(len(dims) - 1, -1, -1))


def _candidates(program: Interface, batch_dims: tuple[int, ...]) -> Iterator[tuple[bool, ...]]:
    """Which inputs may have a part for each sample, the fewest first."""
    signature = program.signature
    batch = tuple(signature.states[0].shape[dim] for dim in batch_dims)
    if any(size != 1 for size in batch):
        fits = [spec.shape[: len(batch)] == batch for spec in (*signature.operands, *signature.shared)]
    else:
        fits = [False for _ in (*signature.operands, *signature.shared)]
    positions = [index for index, fit in enumerate(fits) if fit]
    for chosen in itertools.product((False, True), repeat=min(len(positions), _MAX_CANDIDATES)):
        follows = {position for position, choice in zip(positions, chosen, strict=False) if choice}
        yield tuple(index in follows for index in range(len(fits)))


def _places_of_outputs(program: Interface, dims: tuple[int, ...], own: tuple[bool, ...]) -> tuple[tuple[int, ...], ...]:
    """For each output the dimensions that tell samples apart.

    Inputs with a part for each sample must be used by that sample alone, as states are.
    """
    chain = program.chain
    if not any(own) and not chain.num_outputs:
        return ()
    # The traced block takes states, operands, literals, shared operands.
    after = chain.num_states + len(chain.literals)
    followers = {
        index + (chain.num_states if index < chain.num_operands else after): dims
        for index, follows in enumerate(own)
        if follows
    }
    block = trace_block(chain, program.signature)
    proved = prove_batch_dimensions(block, chain.num_states, followers)
    is_single = all(program.signature.states[0].shape[dim] == 1 for dim in dims)
    if is_single and not followers:
        return tuple(() for _ in proved.outputs)  # what is there is that of the one sample
    if not set(dims) <= set(proved.dims):
        raise BodyError("an operand or output of the size of the batch is not used sample by sample")
    numbers = [proved.dims.index(dim) for dim in dims]
    places = []
    for found in proved.outputs:
        if found is None:
            raise BodyError("an output is not each sample's own")
        places.append(tuple(found[number] for number in numbers))
    return tuple(places)


def _one(spec: TensorSpec, dims: Sequence[int]) -> TensorSpec:
    """That of one sample."""
    return replace(spec, shape=tuple(1 if dim in dims else size for dim, size in enumerate(spec.shape)))


def _trace_sample(
    program: Interface, batch_dims: tuple[int, ...], own: tuple[bool, ...], places: Sequence[tuple[int, ...]]
) -> SampleBody:
    layout, operands = StateLayout(program.layout.shapes, batch_dims), program.chain.num_operands
    batch_rank = len(layout.batch_dims)
    old = program.signature
    others = [
        _one(spec, range(batch_rank) if follows else ())
        for spec, follows in zip((*old.operands, *old.shared), own, strict=True)
    ]
    signature = Signature(
        tuple(_one(spec, layout.batch_dims) for spec in old.states), tuple(others[:operands]), tuple(others[operands:])
    )
    tracer = Tracer(program.chain, signature, layout, Generality(False, tuple(() for _ in others)))
    tensors = [tracer.state, *tracer.operands, *tracer.shared]
    outputs = _outputs(program, places)
    shapes = [tuple(tracer.state.shape), *(_one(output.spec, output.batch_dims).shape for output in outputs)]

    def block(*inputs: Any) -> tuple[Any, ...]:
        results = tracer.block(*inputs)
        if [tuple(result.shape) for result in results] != shapes:
            raise BodyError("the block fixes its batch size")
        return results

    def step(*inputs: Any) -> Any:
        results = block(*inputs)
        return results if outputs else results[0]

    cotangents = [TensorSpec.of(tracer.state), *(_one(output.spec, output.batch_dims) for output in outputs)]
    with tracer.mode:
        ones = [torch.empty(spec.shape, dtype=spec.dtype) for spec in cotangents if spec.is_differentiable]
        runs: dict[str, tuple[Run, Sequence[Tensor]]] = {
            "step": (step, tensors),
            "pullback": (tracer.pullback_of(step), [*tensors, *ones]),
        }
        if holds_derivatives(program.chain.body.graph):
            # `functionalize` knows no functions with derivatives of their own: it gets the ops that these are made of.
            runs = {name: (_as_ops(run, given), given) for name, (run, given) in runs.items()}
        graphs = {name: _trace_functional(run, given) for name, (run, given) in runs.items()}
    literals = (False,) * len(program.chain.literals)
    own = (*own[:operands], *literals, *own[operands:])
    return SampleBody(batch_dims, layout.dimension, own, outputs=outputs, **graphs)


def _outputs(program: Interface, places: Sequence[tuple[int, ...]]) -> tuple[SampleOutput, ...]:
    if not places or not program.chain.num_outputs:
        return ()
    block = trace_block(program.chain, program.signature)
    results: Any = block.graph.output_node().args[0]
    specs = [TensorSpec.of(node.meta["val"]) for node in results[program.chain.num_states :]]
    return tuple(
        SampleOutput(spec, dims, math.prod(_one(spec, dims).shape)) for spec, dims in zip(specs, places, strict=True)
    )


def _as_ops(function: Run, arguments: Sequence[Tensor]) -> Run:
    graph = trace(function, arguments)
    return lambda *inputs: graph(*inputs)


def _trace_functional(run: Run, arguments: Sequence[Tensor]) -> fx.GraphModule:
    graph = trace(torch.func.functionalize(run), arguments, DECOMPOSITIONS)
    if holds_complex(graph.graph):
        run = by_parts(trace(torch.func.functionalize(run), arguments))
        graph = trace(torch.func.functionalize(run), arguments, DECOMPOSITIONS)
    if any(map(is_mutable, graph.graph.nodes)):
        # A decomposition is written in PyTorch too, and may write in place itself.
        graph = trace(torch.func.functionalize(lambda *inputs: graph(*inputs)), arguments, DECOMPOSITIONS)
    return graph
