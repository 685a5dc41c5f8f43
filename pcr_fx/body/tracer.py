"""Traces of a block: one at its own sizes, and those of its programs for any batch size where the block allows it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from pcr_fx.body.generalise import STAND_INS, generalise
from pcr_fx.body.isolation import stop_if_abandoned
from pcr_fx.body.layout import StateLayout
from pcr_fx.body.purity import check_drawless
from pcr_fx.body.signature import Generality, Signature
from pcr_fx.body.written_out import write_out_fused
from pcr_fx.chain import Chain, TensorSpec
from pcr_fx.errors import BodyError

log = logging.getLogger(__name__)
_FAKE_TENSOR_LOG = logging.getLogger("torch._subclasses.fake_tensor")

Run = Callable[..., Any]
# Programs whose first input is one state `[*batch, d]`; that of the others is a trajectory `[L, *batch, d]`.
_OF_ONE_BLOCK = ("step", "step_pullback")


def trace_block(chain: Chain, signature: Signature) -> fx.GraphModule:
    """One block as an aten graph at the sizes of `signature`, with a fake `meta["val"]` on every node."""
    with FakeTensorMode() as mode:
        arguments = [_fake(mode, spec) for spec in (*signature.states, *signature.operands)]
        arguments += [_fake(mode, signature.number) for _ in chain.literals]
        arguments += [_fake(mode, spec) for spec in signature.shared]
        body = write_out_fused(chain.body)
        if chain.literals:
            _check_numbers(chain, body, arguments)
        return trace(lambda *tensors: tuple(body(*tensors)), arguments)


class _Dtypes(fx.Interpreter):
    """Runs a body, and notes the dtype of what each node returns."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__(body)
        self.found: dict[fx.Node, torch.dtype] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.found[n] = result.dtype
        return result


def _check_numbers(chain: Chain, body: fx.GraphModule, arguments: Sequence[Any]) -> None:
    """Check that a block's numbers give the same dtypes as the tensors that stand for them.

    A Python number times a mask or a whole number is of the default dtype, whatever that of the state.

    Raises:
        BodyError: they do not.
    """
    before = chain.num_states + chain.num_operands
    after = before + len(chain.literals)
    numbers = [*arguments[:before], *(values[0] for values in chain.literals), *arguments[after:]]
    by_tensors, by_numbers = _Dtypes(body), _Dtypes(body)
    try:
        by_tensors.run(*arguments)
        by_numbers.run(*numbers)
    except Exception:  # what is wrong is told where the block is traced
        return
    for node, dtype in by_numbers.found.items():
        if by_tensors.found.get(node, dtype) != dtype:
            name = getattr(node.target, "__name__", str(node.target))
            raise BodyError(f"{name} with a number that differs from block to block is {dtype}, whatever the state is")


def trace(function: Run, arguments: Sequence[Any], decompositions: Any = None) -> fx.GraphModule:
    """`function` as an aten graph, or `BodyError` with what went wrong in words."""
    stop_if_abandoned()
    try:
        # Attention in ordinary ops: its fused kernels have no vmap rule, and would be traced once a block and row.
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.autocast(arguments[0].device.type, enabled=False),
            _quiet(_FAKE_TENSOR_LOG),
        ):
            graph = make_fx(function, decompositions)(*arguments)
    except BodyError:
        raise
    except Exception as error:
        raise BodyError(f"the block cannot be traced: {_first_line(error)}") from error
    if decompositions is None:  # else it is not run, but printed
        _allow_any_strides(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _allow_any_strides(graph: fx.Graph) -> None:
    """Have views copy where they must: what a program is given lies otherwise than what it is traced with."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default


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


def _fake(mode: FakeTensorMode, spec: TensorSpec) -> FakeTensor:
    """A distinct fake tensor: the tracer would take one object passed twice for one input."""
    with mode:
        return torch.empty(spec.shape, dtype=spec.dtype, device=spec.device)  # type: ignore[return-value]


def trace_graphs(
    chain: Chain, signature: Signature, layout: StateLayout
) -> tuple[dict[str, fx.GraphModule], Generality]:
    """Every program of the body, for any batch size where the body allows it, else for this one."""
    for generality in _generalities(signature, layout):
        try:
            return trace_for(chain, signature, layout, generality), generality
        except BodyError as reason:
            if not generality.any_batch:
                raise
            log.debug("not traced for any batch size: %s", reason)
    raise AssertionError("the last generality has no free size")


def trace_for(
    chain: Chain, signature: Signature, layout: StateLayout, generality: Generality
) -> dict[str, fx.GraphModule]:
    """Every program of the body for such sizes."""
    if not generality.any_batch:
        return Tracer(chain, signature, layout, generality).graphs()
    first, second = (Tracer(chain, signature, layout, generality, sizes).graphs() for sizes in STAND_INS)
    rank = len(layout.batch_dims)
    return {name: generalise(first[name], second[name], rank, int(name not in _OF_ONE_BLOCK)) for name in first}


def _generalities(signature: Signature, layout: StateLayout) -> list[Generality]:
    """What to try, in order: operands apart from the batch, operands that share its size, this size alone."""
    others = (*signature.operands, *signature.shared)
    fixed: tuple[tuple[tuple[int, int], ...], ...] = ((),) * len(others)
    if not 0 < len(layout.batch_dims) <= len(STAND_INS[0]):
        return [Generality(False, fixed)]
    batch = [signature.states[0].shape[dim] for dim in layout.batch_dims]
    equal = tuple(_followed(spec.shape, batch) for spec in others)
    leading = tuple(pairs[:1] for pairs in equal)
    # Equal from behind, as broadcasting has it.
    behind = tuple(_mirrored(_followed(spec.shape[::-1], batch[::-1]), len(spec.shape), len(batch)) for spec in others)
    tried = dict.fromkeys([fixed, leading, equal, behind])
    return [*(Generality(True, follows) for follows in tried), Generality(False, fixed)]


def _followed(shape: Sequence[int], batch: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Dimensions with the size of a batch dimension, each with the number of that; where several are alike, in order."""
    left, pairs = list(range(len(batch))), []
    for dim, size in enumerate(shape):
        number = next((number for number in left if batch[number] == size), None)
        if number is not None:
            left.remove(number)
            pairs.append((dim, number))
    return tuple(pairs)


def _mirrored(pairs: Sequence[tuple[int, int]], rank: int, batch_rank: int) -> tuple[tuple[int, int], ...]:
    return tuple((rank - 1 - dim, batch_rank - 1 - number) for dim, number in reversed(pairs))


class Tracer:
    """Traces the programs of one body with one set of fake tensors.

    Args:
        chain, signature, layout: what is traced.
        generality: which sizes may be others later.
        stand_ins: those that are traced in place of the batch's.
    """

    def __init__(
        self,
        chain: Chain,
        signature: Signature,
        layout: StateLayout,
        generality: Generality,
        stand_ins: Sequence[int] = (),
    ) -> None:
        self.chain, self.layout, self.generality = chain, layout, generality
        self.body = write_out_fused(chain.body)
        self.mode = FakeTensorMode()
        state = signature.states[0]
        batch = tuple(state.shape[dim] for dim in layout.batch_dims)
        batch = tuple(stand_ins[: len(batch)]) or batch
        self.state = _fake(self.mode, TensorSpec((*batch, layout.dimension), state.dtype, state.device))
        others = [
            _fake(self.mode, _with_sizes(spec, pairs, batch))
            for spec, pairs in zip((*signature.operands, *signature.shared), generality.follows, strict=True)
        ]
        literals = [_fake(self.mode, signature.number) for _ in chain.literals]
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
            step_pullback = trace(self.pullback_of(self.step), [*one, torch.empty_like(self.state)])
            check_drawless(step_pullback)
            graphs = {
                "step": trace(self.step, one),
                "step_pullback": step_pullback,
                "evaluate": trace(self._evaluate, every),
                "linearise": trace(self._linearise, every),
                "pullback": trace(self.pullback_of(self._evaluate), [*every, torch.empty_like(stacked[0])]),
            }
        graphs["pull"] = _first_result(graphs["pullback"])
        return graphs

    def _stack(self, tensor: FakeTensor) -> FakeTensor:
        with self.mode:
            return tensor.new_empty((self.chain.length, *tensor.shape))  # type: ignore[return-value]

    def _split(self, tensors: Sequence[Any]) -> tuple[Any, list[Any], list[Any]]:
        count = 1 + len(self.operands)
        return tensors[0], list(tensors[1:count]), list(tensors[count:])

    def block(self, *tensors: Any) -> tuple[Any, ...]:
        """The new state, then the outputs that the body returns."""
        state, operands, shared = self._split(tensors)
        states = self.layout.unflatten(state)
        results = tuple(self.body.forward(*states, *operands, *shared))
        return self.layout.flatten(results[: len(states)]), *results[len(states) :]

    def step(self, *tensors: Any) -> Any:
        return self.block(*tensors)[0]

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
        new_state, pullback = torch.func.vjp(lambda moving: self.step(moving, *rest), state)  # type: ignore[misc]
        basis = torch.eye(self.layout.dimension, dtype=state.dtype, device=state.device)
        rows = torch.vmap(lambda row: pullback(row.expand(state.shape))[0])(basis)
        # Moved here: PyTorch crashes where vmap is to move a dimension of rows that do not depend on the state.
        return new_state, rows.movedim(0, -2)

    def pullback_of(self, function: Run) -> Run:
        """`(*tensors, *cotangents) -> (d_state, *d_operands, *d_shared)` of `function`, differentiable inputs only.

        There is a cotangent for each floating result.
        """
        needs = self.needs

        def pullback(*tensors: Any) -> tuple[Any, ...]:
            primals, cotangents = tensors[: len(needs)], tensors[len(needs) :]

            def moving(*active: Any) -> tuple[Any, ...]:
                waiting = iter(active)
                given = (next(waiting) if need else fixed for need, fixed in zip(needs, primals, strict=True))
                results = function(*given)
                every = results if isinstance(results, tuple) else (results,)
                return tuple(result for result in every if result.is_floating_point() or result.is_complex())

            active = [primal for need, primal in zip(needs, primals, strict=True) if need]
            return torch.func.vjp(moving, *active)[1](cotangents)

        return pullback


def _first_result(graph: fx.GraphModule) -> fx.GraphModule:
    """What computes the first result of `graph` by itself."""
    alone = fx.Graph()
    outputs: Any = alone.graph_copy(graph.graph, {})
    alone.output(outputs[0])
    alone.eliminate_dead_code()
    return fx.GraphModule(graph, alone)


def _with_sizes(spec: TensorSpec, follows: Sequence[tuple[int, int]], batch: Sequence[int]) -> TensorSpec:
    shape = list(spec.shape)
    for dim, number in follows:
        shape[dim] = batch[number]
    return TensorSpec(tuple(shape), spec.dtype, spec.device)
