"""A body's programs: traced once to aten graphs, so that running them needs no transform, only ops.

Nested function transforms inside an operator's kernel fail under AOTAutograd, and at run time under the saved-tensor
hooks of activation checkpointing; graphs traced beforehand do not care where they run.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention import SDPBackend, sdpa_kernel

from pcr_fx.body.batch import BatchDimensions, prove_batch_dimensions
from pcr_fx.body.isolation import isolated
from pcr_fx.body.layout import StateLayout
from pcr_fx.body.purity import check_pure
from pcr_fx.body.written_out import write_out_fused
from pcr_fx.chain import Chain, TensorSpec
from pcr_fx.errors import BodyError

log = logging.getLogger(__name__)
_FAKE_TENSOR_LOG = logging.getLogger("torch._subclasses.fake_tensor")

Run = Callable[..., Any]

# Sizes that stand for the batch while a program is traced for any batch: unequal to 0 and 1, which the tracer would
# take for constants, and unlikely to equal another size of the body by chance.
_TRACED_BATCH_SIZES = (1409, 1423, 1427, 1429, 1433, 1439, 1447, 1451)


@dataclass(frozen=True)
class Signature:
    """The tensors of one block: states, per-block operands (without their leading L) and shared operands."""

    states: tuple[TensorSpec, ...]
    operands: tuple[TensorSpec, ...]
    shared: tuple[TensorSpec, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """All that runs a chain, for one signature. States are flat: `z` `[*batch, d]`, `Z` `[L, *batch, d]`.

    Per-block operands are `[...]` in `step*` and `[L, ...]` elsewhere. Cotangents of floating and complex operands only.

    Attributes:
        key: hash of everything below: two programs with one key compute the same.
        step: `(z, *operands, *shared) -> z`, one block.
        step_pullback: `(z, *operands, *shared, cotangent) -> (dz, *d_operands, *d_shared)`.
        evaluate: `(Z, *operands, *shared) -> Z`, all blocks at once, each on its own state.
        linearise: `(Z, *operands, *shared) -> (Z, J)`, J `[L, *batch, d, d]`.
        pullback: `(Z, *operands, *shared, cotangents) -> (dZ, *d_operands, *d_shared)`.
        pull: the first of these alone, `(Z, *operands, *shared, cotangents) -> dZ`.
        literals: the chain's literals as tensors `[L]`; they follow the operands in every call.
        generality: for which other sizes it is right as well.
    """

    key: str
    chain: Chain
    signature: Signature
    layout: StateLayout
    batch: BatchDimensions
    ops: tuple[str, ...]
    literals: tuple[Tensor, ...]
    generality: Generality
    step: Run
    step_pullback: Run
    evaluate: Run
    linearise: Run
    pullback: Run
    pull: Run
    _shorter: dict[int, Program] = field(default_factory=dict, repr=False)

    def of_length(self, length: int) -> Program:
        """The program of so many of the chain's blocks in a row: whichever these are, given their operands."""
        if length == self.length:
            return self
        if length not in self._shorter:
            literals = tuple(values[:length] for values in self.chain.literals)
            chain = replace(self.chain, length=length, literals=literals)
            self._shorter[length] = build_program(chain, self.signature)
        return self._shorter[length]

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
        """Which per-block operands have a cotangent."""
        return tuple(spec.is_differentiable for spec in self.signature.operands)

    @property
    def differentiable_shared(self) -> tuple[bool, ...]:
        return tuple(spec.is_differentiable for spec in self.signature.shared)


@dataclass(frozen=True)
class Generality:
    """The sizes for which a trace is right beside its own.

    Attributes:
        any_batch: whether the batch dimensions of the state may have any size.
        operand_dims: for each operand, then each shared operand, the dimensions that may follow the batch.
    """

    any_batch: bool
    operand_dims: tuple[tuple[int, ...], ...]

    def widen(self, signature: Signature, batch_dims: tuple[int, ...]) -> tuple[Any, ...]:
        """`signature` with every free size left out: signatures that widen alike share a program."""
        state_dims = batch_dims if self.any_batch else ()
        batch = {signature.states[0].shape[dim] for dim in state_dims}
        states = [_without(spec, state_dims, batch) for spec in signature.states]
        others = zip((*signature.operands, *signature.shared), self.operand_dims, strict=True)
        return batch_dims, *states, *(_without(spec, dims, batch) for spec, dims in others)


def _without(spec: TensorSpec, dims: tuple[int, ...], batch: set[int]) -> TensorSpec:
    """`spec` without its sizes along `dims` that follow the batch; others, such as 1 to broadcast, are kept."""
    shape = tuple(-1 if dim in dims and size in batch else size for dim, size in enumerate(spec.shape))
    return TensorSpec(shape, spec.dtype, spec.device)


# By content, for good: a compiled graph names its program and may outlive the module that it was made for.
_programs: dict[str, Program] = {}
_of_block: dict[str, Program] = {}
_of_chain: weakref.WeakKeyDictionary[Chain, list[Program]] = weakref.WeakKeyDictionary()


def program_by_key(key: str) -> Program:
    """The program that an operator call names."""
    return _programs[key]


@isolated
def build_program(chain: Chain, signature: Signature) -> Program:
    """Trace `chain` for `signature`; chains with the same content share one program.

    Raises:
        BodyError: the block is random, mutates, changes the shape or dtype of its state, or cannot be traced.
    """
    block = trace_block(chain, signature)
    same_block = _content_key(chain, signature, (), {"block": block})
    if same_block not in _of_block:
        _of_block[same_block] = _program_for(chain, signature, block)
    return _of_block[same_block]


def _program_for(chain: Chain, signature: Signature, block: fx.GraphModule) -> Program:
    check_pure(block)
    _check_states(block, signature)
    batch = prove_batch_dimensions(block, chain.num_states)
    for program in _of_chain.setdefault(chain, []):
        widen = program.generality.widen
        if widen(signature, batch.dims) == widen(program.signature, program.batch.dims):
            return program
    layout = StateLayout(tuple(spec.shape for spec in signature.states), batch.dims)
    literals = _literal_tensors(chain, signature)
    graphs, generality = _trace_graphs(chain, signature, layout)
    key = _content_key(chain, signature, layout.batch_dims, graphs)
    if key not in _programs:
        runs: dict[str, Any] = {name: graph.forward for name, graph in graphs.items()}
        _programs[key] = Program(
            key,
            chain,
            signature,
            layout,
            batch,
            _op_names(block),
            literals,
            generality,
            **runs,
        )
    _of_chain[chain].append(_programs[key])
    return _programs[key]


def trace_block(chain: Chain, signature: Signature) -> fx.GraphModule:
    """One block as an aten graph at the sizes of `signature`, with a fake `meta["val"]` on every node."""
    with FakeTensorMode() as mode:
        arguments = [_fake(mode, spec, ()) for spec in (*signature.states, *signature.operands)]
        arguments += [_fake(mode, TensorSpec((), *_compute(signature)), ()) for _ in chain.literals]
        arguments += [_fake(mode, spec, ()) for spec in signature.shared]
        body = write_out_fused(chain.body)
        return trace(lambda *tensors: tuple(body(*tensors)), arguments)


def _compute(signature: Signature) -> tuple[torch.dtype, torch.device]:
    return signature.states[0].dtype, signature.states[0].device


def _literal_tensors(chain: Chain, signature: Signature) -> tuple[Tensor, ...]:
    dtype, device = _compute(signature)
    return tuple(torch.tensor(values, dtype=dtype, device=device) for values in chain.literals)


def _check_states(block: fx.GraphModule, signature: Signature) -> None:
    dtypes = {spec.dtype for spec in signature.states}
    if len(dtypes) > 1:
        raise BodyError(f"the states differ in dtype: {', '.join(sorted(map(str, dtypes)))}")
    if not signature.states[0].dtype.is_floating_point:
        raise BodyError(f"the state has dtype {signature.states[0].dtype}, which is not a floating dtype")
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
        node.target._schema.name.removeprefix("aten::")
        for node in block.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    )


def trace(function: Run, arguments: Sequence[Any], decompositions: Any = None) -> fx.GraphModule:
    """`function` as an aten graph, or `BodyError` with what went wrong in words."""
    try:
        # Attention in ordinary ops: its fused kernels have no vmap rule, and would be traced once a block and row.
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.autocast(arguments[0].device.type, enabled=False),
            _quiet(_FAKE_TENSOR_LOG),
        ):
            graph = make_fx(function, decompositions)(*arguments)
    except Exception as error:
        raise BodyError(f"the block cannot be traced: {_first_line(error)}") from error
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """A trace that fails is an answer here, not an error to print."""
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def _fake(mode: FakeTensorMode, spec: TensorSpec, dynamic: Sequence[int]) -> FakeTensor:
    """A distinct fake tensor: the tracer would take one object passed twice for one input."""
    with mode:
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device=spec.device)
    if not dynamic:
        return tensor  # type: ignore[return-value]
    sizes = [DimDynamic.DYNAMIC if dim in dynamic else DimDynamic.STATIC for dim in range(len(spec.shape))]
    real = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
    fake = mode.from_tensor(real, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
    with mode:
        return torch.empty(fake.shape, dtype=spec.dtype, device=spec.device)  # type: ignore[return-value]


def _trace_graphs(
    chain: Chain, signature: Signature, layout: StateLayout
) -> tuple[dict[str, fx.GraphModule], Generality]:
    """Every program of the body, for any batch size where the body allows it, else for this one."""
    for generality in _generalities(signature, layout):
        try:
            return Tracer(chain, signature, layout, generality).graphs(), generality
        except BodyError as reason:
            if not generality.any_batch:
                raise
            log.debug("not traced for any batch size: %s", reason)
    raise AssertionError("the last generality has no free size")


def _generalities(signature: Signature, layout: StateLayout) -> list[Generality]:
    """What to try, in order: operands apart from the batch, operands that share its size, this size alone."""
    others = (*signature.operands, *signature.shared)
    fixed: tuple[tuple[int, ...], ...] = ((),) * len(others)
    if not layout.batch_dims:
        return [Generality(False, fixed)]
    sizes = {signature.states[0].shape[dim] for dim in layout.batch_dims}
    equal = tuple(tuple(dim for dim, size in enumerate(spec.shape) if size in sizes) for spec in others)
    leading = tuple(dims[:1] for dims in equal)
    tried = dict.fromkeys([fixed, leading, equal])
    return [*(Generality(True, dims) for dims in tried), Generality(False, fixed)]


class Tracer:
    """Traces the programs of one body with one set of fake tensors."""

    def __init__(self, chain: Chain, signature: Signature, layout: StateLayout, generality: Generality) -> None:
        self.chain, self.layout, self.generality = chain, layout, generality
        self.body = write_out_fused(chain.body)
        self.environment = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.environment)
        state = signature.states[0]
        batch = tuple(state.shape[dim] for dim in layout.batch_dims)
        # Operands that share the batch's size are traced with the size that stands for it.
        stand_ins = dict(zip(batch, _TRACED_BATCH_SIZES, strict=False)) if generality.any_batch else {}
        if generality.any_batch:
            batch = tuple(stand_ins[size] for size in batch)
        self.batch_rank = len(batch)
        flat = TensorSpec((*batch, layout.dimension), state.dtype, state.device)
        self.state = _fake(self.mode, flat, range(self.batch_rank) if generality.any_batch else ())
        others = [
            _fake(self.mode, _with_sizes(spec, dims, stand_ins), dims)
            for spec, dims in zip((*signature.operands, *signature.shared), generality.operand_dims, strict=True)
        ]
        number = TensorSpec((), state.dtype, state.device)
        literals = [_fake(self.mode, number, ()) for _ in chain.literals]
        self.operands = [*others[: len(signature.operands)], *literals]
        self.shared = others[len(signature.operands) :]
        # A literal is a number: it has no cotangent.
        self.needs = [True, *(spec.is_differentiable for spec in signature.operands)]
        self.needs += [False for _ in literals]
        self.needs += [spec.is_differentiable for spec in signature.shared]

    def graphs(self) -> dict[str, fx.GraphModule]:
        one = [self.state, *self.operands, *self.shared]
        stacked = [self._stack(tensor) for tensor in (self.state, *self.operands)]
        every = [*stacked, *self.shared]
        with self.mode:
            graphs = {
                "step": trace(self.step, one),
                "step_pullback": trace(self.pullback_of(self.step), [*one, torch.empty_like(self.state)]),
                "evaluate": trace(self._evaluate, every),
                "linearise": trace(self._linearise, every),
                "pullback": trace(self.pullback_of(self._evaluate), [*every, torch.empty_like(stacked[0])]),
            }
        graphs["pull"] = _first_output(graphs["pullback"])
        self._check_any_batch()
        return graphs

    def _stack(self, tensor: FakeTensor) -> FakeTensor:
        with self.mode:
            return tensor.new_empty((self.chain.length, *tensor.shape))  # type: ignore[return-value]

    def _split(self, tensors: Sequence[Any]) -> tuple[Any, list[Any], list[Any]]:
        count = 1 + len(self.operands)
        return tensors[0], list(tensors[1:count]), list(tensors[count:])

    def step(self, *tensors: Any) -> Any:
        state, operands, shared = self._split(tensors)
        states = self.layout.unflatten(state)
        return self.layout.flatten(tuple(self.body(*states, *operands, *shared)))

    def _evaluate(self, *tensors: Any) -> Any:
        return torch.vmap(self.step, in_dims=self._in_dims())(*tensors)

    def _linearise(self, *tensors: Any) -> Any:
        return torch.vmap(self.step_and_jacobian, in_dims=self._in_dims())(*tensors)

    def _in_dims(self) -> tuple[int | None, ...]:
        return (0, *(0 for _ in self.operands), *(None for _ in self.shared))

    def step_and_jacobian(self, state: Any, *rest: Any) -> tuple[Any, Any]:
        """The block and its Jacobian `[*batch, d, d]`, by d cotangents that are one-hot in the features.

        Each is the same for all samples: along batch dimensions the block acts independently, so that one pullback
        gives a row of every sample's Jacobian.
        """
        if self.layout.dimension == 0:  # an empty batch; PyTorch crashes in a vmap over no rows
            return self.step(state, *rest), state.new_empty((*state.shape, 0))
        output, pullback = torch.func.vjp(lambda moving: self.step(moving, *rest), state)  # type: ignore[misc]
        basis = torch.eye(self.layout.dimension, dtype=state.dtype, device=state.device)
        rows = torch.vmap(lambda row: pullback(row.expand(state.shape))[0])(basis)
        # Moved here: PyTorch crashes where vmap is to move a dimension of rows that do not depend on the state.
        return output, rows.movedim(0, -2)

    def pullback_of(self, function: Run) -> Run:
        """`(*tensors, cotangent) -> (d_state, *d_operands, *d_shared)` of `function`, differentiable inputs only."""
        needs = self.needs

        def pullback(*tensors: Any) -> tuple[Any, ...]:
            *primals, cotangent = tensors

            def moving(*active: Any) -> Any:
                waiting = iter(active)
                return function(*(next(waiting) if need else fixed for need, fixed in zip(needs, primals, strict=True)))

            active = [primal for need, primal in zip(needs, primals, strict=True) if need]
            return torch.func.vjp(moving, *active)[1](cotangent)

        return pullback

    def _check_any_batch(self) -> None:
        """No guard may bind a batch size to a number or a range; operands may be bound to the batch."""
        if not self.generality.any_batch:
            return
        for size in self.state.shape[: self.batch_rank]:
            if not isinstance(size, torch.SymInt) or size.node.maybe_as_int() is not None:
                raise BodyError("the block fixes its batch size")
        for guard in self.environment.guards:
            if not isinstance(guard.expr, sympy.Equality):
                raise BodyError(f"the block is only right for batch sizes with {guard.expr}")


def _first_output(graph: fx.GraphModule) -> fx.GraphModule:
    """What computes the first result of `graph` by itself."""
    alone = fx.Graph()
    outputs: Any = alone.graph_copy(graph.graph, {})
    alone.output(outputs[0])
    alone.eliminate_dead_code()
    return fx.GraphModule(graph, alone)


def _with_sizes(spec: TensorSpec, dims: tuple[int, ...], stand_ins: dict[int, int]) -> TensorSpec:
    shape = tuple(stand_ins[size] if dim in dims else size for dim, size in enumerate(spec.shape))
    return TensorSpec(shape, spec.dtype, spec.device)


def _content_key(
    chain: Chain, signature: Signature, batch_dims: tuple[int, ...], graphs: dict[str, fx.GraphModule]
) -> str:
    """A hash of all that decides what a program computes."""
    digest = hashlib.sha256()
    for part in (chain.length, chain.literals, signature, batch_dims):
        digest.update(repr(part).encode())
    for name, graph in graphs.items():
        digest.update(name.encode() + graph.code.encode())
        for attribute, tensor in sorted(graph.named_buffers()):
            values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(attribute.encode() + repr(tensor.dtype).encode() + values.numpy().tobytes())
    return digest.hexdigest()[:32]
