"""A body's programs: traced once to aten graphs, so that running them needs no transform, only ops.

Nested function transforms inside an operator's kernel fail under AOTAutograd, and at run time under the saved-tensor
hooks of activation checkpointing; graphs traced beforehand do not care where they run.
"""

from __future__ import annotations

import hashlib
import operator
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from pcr_fx.body.agreement import disagreement
from pcr_fx.body.batch import BatchDimensions, prove_batch_dimensions
from pcr_fx.body.isolation import isolated
from pcr_fx.body.layout import StateLayout
from pcr_fx.body.purity import check_pure
from pcr_fx.body.signature import Generality, Signature
from pcr_fx.body.tracer import Run, trace_block, trace_for, trace_graphs
from pcr_fx.call import Call
from pcr_fx.chain import Chain
from pcr_fx.errors import BodyError, is_out_of_memory
from pcr_fx.graphs.nodes import qualified_name
from pcr_fx.graphs.parts import shows_pullback
from pcr_fx.registry import Registry


@dataclass(frozen=True, eq=False)
class Interface:
    """What goes into a chain for one signature, and comes out.

    Attributes:
        literals: the chain's literals as tensors `[L]`; they follow the operands in every call.
        wanted: whose cotangents are wanted, of operands and shared operands; `None` for all that have any.
    """

    chain: Chain
    signature: Signature
    layout: StateLayout
    literals: tuple[Tensor, ...]
    wanted: tuple[bool, ...] | None = field(default=None, kw_only=True)

    @classmethod
    def of(cls, chain: Chain, signature: Signature, layout: StateLayout) -> Interface:
        return Interface(chain, signature, layout, _literal_tensors(chain, signature))

    def call_with(self, initial: Tensor, operands: Sequence[Any], shared: Sequence[Tensor]) -> Call:
        """The call of the chain with these tensors, as `Call` has them but for the literals."""
        return Call(initial, [*operands, *self.literals], shared, self.length)

    @property
    def length(self) -> int:
        return self.chain.length

    @property
    def dimension(self) -> int:
        return self.layout.dimension

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that states are solved in."""
        return self.signature.states[0].dtype

    @property
    def differentiable_operands(self) -> tuple[bool, ...]:
        """Which per-block operands have a cotangent that is wanted."""
        return self.differentiable[: len(self.signature.operands)]

    @property
    def differentiable_shared(self) -> tuple[bool, ...]:
        return self.differentiable[len(self.signature.operands) :]

    @property
    def differentiable(self) -> tuple[bool, ...]:
        """Those of operands, then those of shared operands."""
        have = [spec.is_differentiable for spec in (*self.signature.operands, *self.signature.shared)]
        return tuple(have) if self.wanted is None else tuple(map(operator.and_, have, self.wanted))

    @property
    def wanted_results(self) -> list[int]:
        """Which results of a pullback of all that have cotangents are wanted; the first, of the state, always is."""
        have = [spec.is_differentiable for spec in (*self.signature.operands, *self.signature.shared)]
        wanted = [one for one, has in zip(self.differentiable, have, strict=True) if has]
        return [0, *(position for position, one in enumerate(wanted, 1) if one)]

    def wanting(self, wanted: tuple[bool, ...] | None) -> Interface:
        """The same where only these cotangents are wanted, of operands and shared operands."""
        return self if wanted == self.wanted else replace(self, wanted=wanted)


@dataclass(frozen=True, eq=False)
class Program(Interface):
    """All that runs a chain, for one signature. States are flat: `z` `[*batch, d]`, `Z` `[L, *batch, d]`.

    Per-block operands are `[...]` in `step*` and `[L, ...]` elsewhere. Cotangents of floating and complex operands only.

    Attributes:
        key: hash of everything here: two programs with one key compute the same.
        step: `(z, *operands, *shared) -> z`, one block.
        step_pullback: `(z, *operands, *shared, cotangent) -> (dz, *d_operands, *d_shared)`.
        evaluate: `(Z, *operands, *shared) -> Z`, all blocks at once, each on its own state.
        linearise: `(Z, *operands, *shared) -> (Z, J)`, J `[L, *batch, d, d]`.
        pullback: `(Z, *operands, *shared, cotangents) -> (dZ, *d_operands, *d_shared)`.
        pull: the first of these alone, `(Z, *operands, *shared, cotangents) -> dZ`.
        generality: for which other sizes it is right as well.
    """

    key: str
    batch: BatchDimensions
    ops: tuple[str, ...]
    generality: Generality
    step: Run
    step_pullback: Run
    evaluate: Run
    linearise: Run
    pullback: Run
    pull: Run
    _shorter: dict[int, Program] = field(default_factory=dict, repr=False)
    _faults: dict[str, str] = field(default_factory=dict, repr=False)
    _wanting: dict[tuple[bool, ...], Program] = field(default_factory=dict, repr=False)
    _whole: Program | None = field(default=None, repr=False)

    def wanting(self, wanted: tuple[bool, ...] | None) -> Program:
        """The same where only these cotangents are wanted: its pullbacks compute no others."""
        if wanted == self.wanted:
            return self
        assert wanted is not None and self.wanted is None, "what is left out is left out of all"
        if wanted not in self._wanting:
            kept = replace(self, wanted=wanted, _shorter={}, _wanting={}, _whole=self)
            results = kept.wanted_results
            runs: dict[str, Any] = {
                name: SomeResults(getattr(self, name), results) for name in ("step_pullback", "pullback")
            }
            self._wanting[wanted] = replace(kept, **runs)
        return self._wanting[wanted]

    def called_with(self, signature: Signature) -> Program:
        """The same for tensors of another signature that it is right for."""
        shapes = tuple(spec.shape for spec in signature.states)
        return replace(self, signature=signature, layout=replace(self.layout, shapes=shapes), _shorter={}, _wanting={})

    def of_length(self, length: int) -> Program:
        """The program of so many of the chain's blocks in a row: whichever these are, given their operands."""
        if length == self.length:
            return self
        if length not in self._shorter:
            literals = tuple(values[:length] for values in self.chain.literals)
            chain = replace(self.chain, length=length, literals=literals)
            made = build_program(chain, self.signature, most_batch_dims=self.batch.most)
            self._shorter[length] = made.wanting(self.wanted)
        return self._shorter[length]

    def for_chain(self, chain: Chain) -> Program:
        """The same for a chain of more or fewer of the same blocks; what runs all of these at once is traced when it is wanted."""
        later = _TracedLater(chain, self)
        runs: dict[str, Any] = {
            name: partial(later.run, name) for name in ("evaluate", "linearise", "pullback", "pull")
        }
        key = hashlib.sha256(f"{self.key} {chain.length} {chain.literals}".encode()).hexdigest()[:32]
        literals = _literal_tensors(chain, self.signature)
        return replace(self, chain=chain, literals=literals, key=key, _shorter={}, _faults={}, _wanting={}, **runs)

    def fault(self, *names: str) -> str:
        """Why one of these programs of all blocks may not be used, or nothing; found out when it is first asked.

        Args:
            names: of `evaluate`, `linearise` and `pullback`, of which `pull` is a part.
        """
        if self._whole is not None:  # what is left out of one was judged with the rest
            return self._whole.fault(*names)
        for name in names:
            if name not in self._faults:
                try:
                    self._faults[name] = disagreement(self, name)
                except Exception as error:  # not kept: there may be memory for it next time
                    if not is_out_of_memory(error):
                        raise
                    return "there is no memory to compare it with the blocks"
        return next((fault for name in names if (fault := self._faults[name])), "")


class _TracedLater:
    """The programs of all blocks of a chain, for which a program of more or fewer of them stands as it is otherwise."""

    def __init__(self, chain: Chain, program: Program) -> None:
        self.chain, self.program = chain, program
        self.graphs: dict[str, fx.GraphModule] = {}

    def run(self, name: str, *tensors: Tensor) -> Any:
        return self.graph(name).forward(*tensors)

    def graph(self, name: str) -> fx.GraphModule:
        if not self.graphs:
            program = self.program
            self.graphs = isolated(trace_for)(self.chain, program.signature, program.layout, program.generality)
        return self.graphs[name]


class SomeResults:
    """A program of which only some results are wanted, and what these need is computed.

    Args:
        run: the program: the forward of its graph, or what traces that when it is called.
        results: which.
    """

    def __init__(self, run: Run, results: Sequence[int]) -> None:
        self.run, self.results = run, results
        self._graph: fx.GraphModule | None = None

    def __call__(self, *tensors: Tensor) -> Any:
        if self._graph is None:
            run: Any = self.run
            whole = run.func.__self__.graph(*run.args) if isinstance(run, partial) else run.__self__  # type: ignore[attr-defined]
            self._graph = fx.GraphModule(whole, some_results(whole.graph, self.results))
        return self._graph.forward(*tensors)


def some_results(graph: fx.Graph, results: Sequence[int]) -> fx.Graph:
    """What computes some results of `graph`, which are a tuple, and nothing else."""
    alone = fx.Graph()
    outputs: Any = alone.graph_copy(graph, {})
    alone.output(tuple(outputs[index] for index in results))
    alone.eliminate_dead_code()
    return alone


def wanted_among(have: Sequence[bool], asked: Sequence[bool]) -> tuple[bool, ...] | None:
    """Which cotangents are wanted, of those that there are; `None` where it is all of them."""
    wanted = tuple(map(operator.and_, have, asked))
    return None if wanted == tuple(have) else wanted


# By content: of a chain's graphs, and of its block alone, which is traced first.
_programs: Registry[str, Program] = Registry()
_of_block: Registry[str, Program] = Registry()
# Those of one chain for different sizes; a program holds its chain, so this may not hold the program.
_of_chain: weakref.WeakKeyDictionary[Chain, weakref.WeakSet[Program]] = weakref.WeakKeyDictionary()


def block_key(chain: Chain, signature: Signature, block: fx.GraphModule) -> str | None:
    """A hash of all that a chain's block is, whatever the number of blocks and their literals.

    Args:
        block: as `trace_block` makes it.
    """
    if not shows_pullback(chain.body.graph):
        return None
    any_number = replace(chain, length=1, literals=tuple((0.0,) for _ in chain.literals))
    return _content_key(any_number, signature, {"block": block})


@isolated
def build_program(
    chain: Chain, signature: Signature, block: fx.GraphModule | None = None, most_batch_dims: int | None = None
) -> Program:
    """Trace `chain` for `signature`; chains with the same content share one program.

    Args:
        block: as `trace_block` makes it, where that was done already.
        most_batch_dims: how many of the dimensions that could tell samples apart do so; `None` for all.

    Raises:
        BodyError: the block is random, mutates, changes the shape or dtype of its state, or cannot be traced.
    """
    block = block or trace_block(chain, signature)
    if not shows_pullback(chain.body.graph):
        return _program_for(chain, signature, block, most_batch_dims)
    same_block = _content_key(chain, (signature, most_batch_dims), {"block": block})
    program = _of_block.get(same_block)
    if program is None:
        program = _of_block.keep(same_block, _program_for(chain, signature, block, most_batch_dims))
    return program


def _program_for(chain: Chain, signature: Signature, block: fx.GraphModule, most_batch_dims: int | None) -> Program:
    check_pure(block)
    _check_states(block, signature)
    batch = prove_batch_dimensions(block, chain.num_states).leading(most_batch_dims)
    for program in _of_chain.setdefault(chain, weakref.WeakSet()):
        widen = program.generality.widen
        alike = program.batch.dims == batch.dims  # else what follows a batch dimension may follow nothing here
        if alike and widen(signature, batch.dims) == widen(program.signature, batch.dims):
            return program
    layout = StateLayout(tuple(spec.shape for spec in signature.states), batch.dims)
    literals = _literal_tensors(chain, signature)
    graphs, generality = trace_graphs(chain, signature, layout)
    # Where any batch size will do, chains that were first met with different ones have one program.
    key = _content_key(chain, (generality, *generality.widen(signature, batch.dims)), graphs)
    made = _programs.get(key)
    if made is None:
        runs: dict[str, Any] = {name: graph.forward for name, graph in graphs.items()}
        ops = _op_names(block)
        made = Program(chain, signature, layout, literals, key, batch, ops, generality, **runs)
        _programs.keep(key, made)
    _of_chain[chain].add(made)
    return made


def _literal_tensors(chain: Chain, signature: Signature) -> tuple[Tensor, ...]:
    number = signature.number
    return tuple(torch.tensor(values, dtype=number.dtype, device=number.device) for values in chain.literals)


def _check_states(block: fx.GraphModule, signature: Signature) -> None:
    dtypes = {spec.dtype for spec in signature.states}
    if len(dtypes) > 1:
        raise BodyError(f"the states differ in dtype: {', '.join(sorted(map(str, dtypes)))}")
    if not signature.states[0].dtype.is_floating_point:
        dtype = signature.states[0].dtype
        advice = "; that it is complex was not known when the chain was found, without example inputs"
        why = advice if dtype.is_complex else ""
        raise BodyError(f"the state has dtype {dtype}, which is not a floating dtype{why}")
    outputs = block.graph.output_node().args[0]
    for spec, node in zip(signature.states, outputs, strict=True):  # type: ignore[arg-type]
        value = node.meta["val"] if isinstance(node, fx.Node) else node
        if not isinstance(value, Tensor):
            raise BodyError(f"the block returns {value!r} in place of a state")
        if tuple(value.shape) != spec.shape:
            raise BodyError(f"the block changes the shape of its state from {list(spec.shape)} to {list(value.shape)}")
        if value.dtype != spec.dtype:
            raise BodyError(f"the block changes the dtype of its state from {spec.dtype} to {value.dtype}")


def _op_names(block: fx.GraphModule) -> tuple[str, ...]:
    return tuple(
        qualified_name(node).removeprefix("aten.")
        for node in block.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    )


def _content_key(chain: Chain, inputs: Any, graphs: dict[str, fx.GraphModule]) -> str:
    """A hash of all that decides what a program computes.

    Args:
        chain: whose blocks are computed.
        inputs: what they take, with a `repr` that says everything.
        graphs: how they are computed.
    """
    digest = hashlib.sha256()
    for part in (chain.length, chain.literals, inputs):
        digest.update(repr(part).encode())
    if chain.own_op is not None:  # what its ways are measured against
        digest.update(chain.own_op.__name__.encode())
    for name, graph in graphs.items():
        digest.update(name.encode() + graph.code.encode())
        for attribute, tensor in sorted(graph.named_buffers()):
            values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(attribute.encode() + repr(tensor.dtype).encode() + values.numpy().tobytes())
    return digest.hexdigest()[:32]
