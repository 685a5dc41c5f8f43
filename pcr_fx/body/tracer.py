"""Traces of a block: one at its own sizes, and those of its programs for any batch size where the block allows it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention import SDPBackend, sdpa_kernel

from pcr_fx.body.layout import StateLayout
from pcr_fx.body.signature import Generality, Signature
from pcr_fx.body.written_out import write_out_fused
from pcr_fx.chain import Chain, TensorSpec
from pcr_fx.errors import BodyError

log = logging.getLogger(__name__)
_FAKE_TENSOR_LOG = logging.getLogger("torch._subclasses.fake_tensor")

Run = Callable[..., Any]

# Sizes that stand for the batch while a program is traced for any batch: unequal to 0 and 1, which the tracer would
# take for constants, and unlikely to equal another size of the body by chance.
_TRACED_BATCH_SIZES = (1409, 1423, 1427, 1429, 1433, 1439, 1447, 1451)


def trace_block(chain: Chain, signature: Signature) -> fx.GraphModule:
    """One block as an aten graph at the sizes of `signature`, with a fake `meta["val"]` on every node."""
    with FakeTensorMode() as mode:
        arguments = [_fake(mode, spec, ()) for spec in (*signature.states, *signature.operands)]
        arguments += [_fake(mode, signature.number, ()) for _ in chain.literals]
        arguments += [_fake(mode, spec, ()) for spec in signature.shared]
        body = write_out_fused(chain.body)
        return trace(lambda *tensors: tuple(body(*tensors)), arguments)


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


def trace_graphs(
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
        literals = [_fake(self.mode, signature.number, ()) for _ in chain.literals]
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
