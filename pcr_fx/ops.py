"""The operators that a solve node calls: tensors in, tensors out, opaque to every compiler.

They have no autograd formula of their own (`node.py` holds it): an operator with `register_autograd` returns zero
tangents under forward-mode differentiation without a word.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pcr_fx.errors import SolveError, UnsupportedError
from pcr_fx.planner import Plan, plan_by_key
from pcr_fx.solvers import (
    Outcome,
    SolveStats,
    adjoint_sequential,
    adjoint_transposed,
    solve_newton,
    solve_sequential,
)

log = logging.getLogger(__name__)

_records: weakref.WeakValueDictionary[int, SolveRecord] = weakref.WeakValueDictionary()
_record_ids = itertools.count()


@dataclass(eq=False)
class SolveRecord:
    """What happened at one solve node so far. `name` is how the log calls it."""

    name: str
    forward_calls: int = 0
    backward_calls: int = 0
    solver_forward: str | None = None
    solver_backward: str | None = None
    last: SolveStats | None = None
    fallbacks: int = 0
    fallbacks_backward: int = 0
    id: int = field(default_factory=lambda: next(_record_ids))

    def __post_init__(self) -> None:
        _records[self.id] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy is another record, perhaps in another process.
        self.__dict__.update(state, id=next(_record_ids))
        self.__post_init__()

    def forward(self, solver: str, stats: SolveStats) -> None:
        self.forward_calls += 1
        self.solver_forward, self.last = solver, stats
        if stats.fallback is not None:
            self.fallbacks += 1
        log.debug(
            "%s: forward by %s, %d iterations, residual %.2e", self.name, solver, stats.iterations, stats.residual
        )

    def backward(self, solver: str, fallback: bool) -> None:
        self.backward_calls += 1
        self.solver_backward = solver
        self.fallbacks_backward += fallback
        log.debug("%s: backward by %s", self.name, solver)


def _record(record: int) -> SolveRecord:
    """The node's record; a throw-away one when the node is gone but its compiled code still runs."""
    return _records.get(record) or SolveRecord("a chain whose module is gone")


# It reads its residual on the host, which a CUDA graph cannot record.
_HOST_SYNC = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("pcr_fx::solve", mutates_args=(), tags=_HOST_SYNC)
def solve(initial: Tensor, operands: Sequence[Tensor], shared: Sequence[Tensor], plan: str, record: int) -> Tensor:
    """The trajectory `[L, *batch, d]` of the chain that `plan` names, from `initial` `[*batch, d]`."""
    with torch.autocast(initial.device.type, enabled=False):
        return _solve(initial, operands, shared, plan_by_key(plan), _record(record))


def _solve(
    initial: Tensor, operands: Sequence[Tensor], shared: Sequence[Tensor], plan: Plan, record: SolveRecord
) -> Tensor:
    program = plan.program
    every = [*operands, *program.literals]
    choice = plan.choice(initial)
    solver = choice.forward
    if solver == "sequential":
        trajectory, stats = solve_sequential(program, initial, every, shared, choice.kernel)
        record.forward(solver, stats)
        return trajectory
    trajectory, stats = solve_newton(program, initial, every, shared, plan.newton, choice.kernel)
    if not stats.outcome.success:
        stats = _failed(stats, plan, record)
        trajectory, _ = solve_sequential(program, initial, every, shared, choice.kernel)
    record.forward(solver, stats)
    return _owned([trajectory], [initial, *operands, *shared])[0]


def _failed(stats: SolveStats, plan: Plan, record: SolveRecord) -> SolveStats:
    message = (
        f"{record.name}: Newton did not solve the chain of {plan.program.length} blocks: {stats.outcome} "
        f"(residual {stats.residual:.2e}, tolerance {plan.newton.tolerance:.2e}, {stats.iterations} iterations)"
    )
    if plan.options.on_failure == "raise":
        raise SolveError(message)
    # Once loudly; a training run that falls back at every step would fill the log.
    log.log(logging.DEBUG if record.fallbacks else logging.WARNING, "%s; evaluated sequentially instead", message)
    return SolveStats(Outcome.SEQUENTIAL, stats.iterations, 0.0, fallback=stats.outcome)


@solve.register_fake
def _(initial: Tensor, operands: Sequence[Tensor], shared: Sequence[Tensor], plan: str, record: int) -> Tensor:
    return initial.new_empty((plan_by_key(plan).program.length, *initial.shape))


@torch.library.custom_op("pcr_fx::adjoint", mutates_args=(), tags=_HOST_SYNC)
def adjoint(
    initial: Tensor,
    trajectory: Tensor,
    operands: Sequence[Tensor],
    shared: Sequence[Tensor],
    cotangents: Tensor,
    plan: str,
    record: int,
) -> list[Tensor]:
    """Cotangents `[d_initial, *d_operands, *d_shared]`, of floating and complex operands only, in this order."""
    with torch.autocast(initial.device.type, enabled=False):
        return _adjoint(initial, trajectory, operands, shared, cotangents, plan_by_key(plan), _record(record))


def _adjoint(
    initial: Tensor,
    trajectory: Tensor,
    operands: Sequence[Tensor],
    shared: Sequence[Tensor],
    cotangents: Tensor,
    plan: Plan,
    record: SolveRecord,
) -> list[Tensor]:
    program = plan.program
    every = [*operands, *program.literals]
    choice = plan.choice(initial)
    solver, fallback = choice.backward, False
    result: tuple[Tensor, ...]
    if solver == "newton":
        previous = torch.cat([initial.unsqueeze(0), trajectory[:-1]])
        result, accurate = adjoint_transposed(program, previous, every, shared, cotangents, plan.options.linear_solver)
        fallback = not accurate
        if fallback:
            _failed_adjoint(plan, record)
    if solver == "sequential" or fallback:
        result = adjoint_sequential(program, initial, trajectory, every, shared, cotangents, choice.kernel)
    record.backward(solver, fallback)
    return _owned(result, [initial, trajectory, *operands, *shared, cotangents])


def _owned(results: Iterable[Tensor], inputs: Iterable[Tensor]) -> list[Tensor]:
    """The results, contiguous and each in memory of its own.

    An operator's results may share memory neither with its inputs nor with each other, and compilers plan for their
    strides. The pullback of `x + a + b`, say, returns one tensor three times.
    """
    taken = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    owned = []
    for result in results:
        storage = result.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() > result.nbytes or not result.is_contiguous():
            result = result.clone(memory_format=torch.contiguous_format)
        taken.add(result.untyped_storage().data_ptr())
        owned.append(result)
    return owned


def _failed_adjoint(plan: Plan, record: SolveRecord) -> None:
    message = f"{record.name}: the transposed reduction is not accurate for this chain of {plan.program.length} blocks"
    if plan.options.on_failure == "raise":
        raise SolveError(message)
    level = logging.DEBUG if record.fallbacks_backward else logging.WARNING
    log.log(level, "%s; its backward ran sequentially instead", message)


@adjoint.register_fake
def _(
    initial: Tensor,
    trajectory: Tensor,
    operands: Sequence[Tensor],
    shared: Sequence[Tensor],
    cotangents: Tensor,
    plan: str,
    record: int,
) -> list[Tensor]:
    program = plan_by_key(plan).program
    wanted = [
        tensor
        for tensors, needs in (
            (operands, program.differentiable_operands),
            (shared, program.differentiable_shared),
        )
        for tensor, need in zip(tensors, needs, strict=True)
        if need
    ]
    return [tensor.new_empty(tensor.shape) for tensor in (initial, *wanted)]


@torch.library.custom_op("pcr_fx::stack", mutates_args=())
def stack(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack(tensors)`. As one opaque operator, since a compiler would emit code for each of thousands."""
    return torch.stack(list(tensors)).contiguous()  # stacked, channels-last weights keep their order in memory


@stack.register_fake
def _(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].new_empty((len(tensors), *tensors[0].shape))


def _register_vmap(op: Any) -> None:
    """Under `vmap`, call the operator once per item: right for every argument, if not fast."""

    @op.register_vmap
    def _(info: Any, in_dims: Any, *arguments: Any) -> Any:
        def item(value: Any, dim: Any, index: int) -> Any:
            if isinstance(value, (list, tuple)):
                return [item(part, dims, index) for part, dims in zip(value, dim, strict=True)]
            return value.select(dim, index) if dim is not None else value

        if info.batch_size == 0:
            raise UnsupportedError("vmap over no items: a chain cannot tell what it would return")
        results = [
            op(*(item(value, dim, index) for value, dim in zip(arguments, in_dims, strict=True)))
            for index in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return [torch.stack(parts) for parts in zip(*results, strict=True)], [0] * len(results[0])


for _op in (solve, adjoint, stack):
    _register_vmap(_op)
