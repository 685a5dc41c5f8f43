"""The operators that a solve node calls: tensors in, tensors out, opaque to every compiler.

They have no autograd formula of their own (`derivatives.py` holds it): an operator with `register_autograd` returns zero
tangents under forward-mode differentiation without a word.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from pcr_fx.body import Program, output_program
from pcr_fx.call import Call
from pcr_fx.errors import SolveError, UnsupportedError
from pcr_fx.planner import Plan, plan_by_key
from pcr_fx.record import SolveRecord, place_of, record_of
from pcr_fx.solvers import Outcome, SolveStats
from pcr_fx.ways import Backward, Forward, Solution

log = logging.getLogger(__name__)


def solve_here(initial: Tensor, operands: Sequence[Tensor], shared: Sequence[Tensor], plan: str, record: int) -> Tensor:
    """The trajectory `[L, *batch, d]` of the chain that `plan` names, from `initial` `[*batch, d]`."""
    with torch.autocast(initial.device.type, enabled=False), torch.cuda.device_of(initial):
        named = plan_by_key(plan)
        return _solve(named.program.call_with(initial, operands, shared), named, record_of(record))


def _solve(call: Call, plan: Plan, record: SolveRecord) -> Tensor:
    samples, may_fall_back = plan.samples(call.initial), plan.options.on_failure == "fallback"
    if plan.wants_another_look(samples):
        plan.measure(call, needs_gradient=False, with_eager=False)
    way: Forward = plan.choice(samples).forward
    if way.iterates and not way.queues and may_fall_back and not record.rest.passes():
        way = plan.fallback(samples)
    watch = plan.watch_of(samples, "forward", way)
    began = perf_counter() if watch is not None and watch.begins() else None
    solution = way.solve(plan.program, call, plan.settings, _start(call.initial, plan, record), may_fall_back)
    if began is not None and watch.ended(perf_counter() - began):  # type: ignore[union-attr]
        plan.doubt(samples)
    if solution.queued is not None:
        _queued(solution.queued, way, plan, record)
        return solution.trajectory
    if way.iterates:
        solution = _checked(solution, way, call, plan, record)
        plan.learn(samples, solution.stats)
    record.forward(way.solver, solution.stats)
    return owned([solution.trajectory], [call.initial, *call.operands, *call.shared])[0]


def _start(initial: Tensor, plan: Plan, record: SolveRecord) -> Tensor | None:
    """The trajectory to start from, if there is one better than the initial state repeated."""
    if plan.options.start != "previous":
        return None
    return record.trajectories.get(place_of(initial))


def _queued(queued: Tensor, way: Forward, plan: Plan, record: SolveRecord) -> None:
    """Nothing here waits for the device, unless a failure is to raise."""
    record.queued(way.solver, queued)
    if plan.options.on_failure == "raise" and (last := record.last) is not None and not last.outcome.success:
        raise SolveError(_failure(last, way, plan, record))


def _checked(solution: Solution, way: Forward, call: Call, plan: Plan, record: SolveRecord) -> Solution:
    """What an iteration found, or the chain evaluated block by block where it found nothing."""
    stats = solution.stats
    if stats.outcome.success:
        record.rest.succeeded()
        if plan.options.start == "previous":
            record.remember(solution.trajectory.clone())
        return solution
    message = _failure(stats, way, plan, record)
    if plan.options.on_failure == "raise":
        record.forward(way.solver, stats)  # the report tells of it all the same
        raise SolveError(message)
    # Once loudly; a training run that falls back at every step would fill the log.
    log.log(logging.DEBUG if record.fallbacks else logging.WARNING, "%s; evaluated sequentially instead", message)
    record.rest.failed()
    in_sequence = plan.fallback(plan.samples(call.initial)).solve(plan.program, call, plan.settings)
    told = SolveStats(Outcome.SEQUENTIAL, stats.iterations, 0.0, fallback=stats.outcome)
    return in_sequence._replace(stats=told)


def _failure(stats: SolveStats, way: Forward, plan: Plan, record: SolveRecord) -> str:
    solver = "Newton" if way.solver == "newton" else way.solver
    return (
        f"{record.name}: {solver} did not solve the chain of {plan.program.length} blocks: {stats.outcome} "
        f"(residual {stats.residual:.2e}, tolerance {plan.settings.tolerance:.2e}, {stats.iterations} iterations)"
    )


def _fake_solve(
    initial: Tensor, operands: Sequence[Tensor], shared: Sequence[Tensor], plan: str, record: int
) -> Tensor:
    return initial.new_empty((plan_by_key(plan).program.length, *initial.shape))


def adjoint_here(
    initial: Tensor,
    trajectory: Tensor,
    operands: Sequence[Tensor],
    shared: Sequence[Tensor],
    cotangents: Tensor,
    plan: str,
    record: int,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Cotangents `[d_initial, *d_operands, *d_shared]`, of floating and complex operands only, in this order.

    Args:
        wanted: whose, of operands and shared operands; empty for all.
    """
    with torch.autocast(initial.device.type, enabled=False), torch.cuda.device_of(initial):
        named = plan_by_key(plan)
        call = named.program.call_with(initial, operands, shared)
        program = named.program.wanting(tuple(wanted) or None)
        return _adjoint(program, call, trajectory, cotangents, named, record_of(record))


def _adjoint(
    program: Program, call: Call, trajectory: Tensor, cotangents: Tensor, plan: Plan, record: SolveRecord
) -> list[Tensor]:
    samples, may_fall_back = plan.samples(call.initial), plan.options.on_failure == "fallback"
    way: Backward = plan.choice(samples).backward
    rests = way.iterates and not way.queues
    if rests and may_fall_back and not record.rest_backward.passes():
        way, rests = plan.fallback(samples), False
    watch = plan.watch_of(samples, "backward", way)
    began = perf_counter() if watch is not None and watch.begins() else None
    result, accurate = way.solve_adjoint(program, call, trajectory, cotangents, plan.settings)
    if began is not None and watch.ended(perf_counter() - began):  # type: ignore[union-attr]
        plan.doubt(samples)
    if not accurate:
        _failed_adjoint(plan, record)
        record.rest_backward.failed()
        in_sequence = plan.fallback(samples)
        result, _ = in_sequence.solve_adjoint(program, call, trajectory, cotangents, plan.settings)
    elif rests:
        record.rest_backward.succeeded()
    record.backward(way.solver, not accurate)
    return owned(result, [call.initial, trajectory, *call.operands, *call.shared, cotangents])


def owned(results: Iterable[Tensor], inputs: Iterable[Tensor]) -> list[Tensor]:
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


def _fake_adjoint(
    initial: Tensor,
    trajectory: Tensor,
    operands: Sequence[Tensor],
    shared: Sequence[Tensor],
    cotangents: Tensor,
    plan: str,
    record: int,
    wanted: Sequence[bool],
) -> list[Tensor]:
    program = plan_by_key(plan).program.wanting(tuple(wanted) or None)
    have = [
        tensor
        for tensors, needs in (
            (operands, program.differentiable_operands),
            (shared, program.differentiable_shared),
        )
        for tensor, need in zip(tensors, needs, strict=True)
        if need
    ]
    return [tensor.new_empty(tensor.shape) for tensor in (initial, *have)]


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


def _operator(name: str, run: Callable[..., Any], fake: Callable[..., Any], *tags: torch.Tag) -> Any:
    op = torch.library.custom_op(f"pcr_fx::{name}", run, mutates_args=(), tags=tags)
    op.register_fake(fake)
    _register_vmap(op)
    return op


def outputs_here(tensors: Sequence[Tensor], program: str) -> list[Tensor]:
    """The outputs of all blocks, by the program of this key."""
    with torch.autocast(tensors[0].device.type, enabled=False), torch.cuda.device_of(tensors[0]):
        return owned(output_program(program).evaluate(*tensors), tensors)


def _fake_outputs(tensors: Sequence[Tensor], program: str) -> list[Tensor]:
    return [tensors[0].new_empty(spec.shape, dtype=spec.dtype) for spec in output_program(program).specs]


def pulled_outputs_here(tensors: Sequence[Tensor], cotangents: Sequence[Tensor], program: str) -> list[Tensor]:
    """The cotangents of what outputs are computed from, as far as it has any."""
    with torch.autocast(tensors[0].device.type, enabled=False), torch.cuda.device_of(tensors[0]):
        return owned(output_program(program).pullback(*tensors, *cotangents), [*tensors, *cotangents])


def _fake_pulled_outputs(tensors: Sequence[Tensor], cotangents: Sequence[Tensor], program: str) -> list[Tensor]:
    pairs = zip(tensors, output_program(program).active, strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, is_active in pairs if is_active]


def stack_here(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack(tensors)`. As one opaque operator, since a compiler would emit code for each of thousands."""
    return torch.stack(list(tensors)).contiguous()  # stacked, channels-last weights keep their order in memory


def _fake_stack(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].new_empty((len(tensors), *tensors[0].shape))


# Where the residual is read on the host, which a CUDA graph cannot record; and where nothing waits.
solve = _operator("solve", solve_here, _fake_solve, torch.Tag.cudagraph_unsafe)
adjoint = _operator("adjoint", adjoint_here, _fake_adjoint, torch.Tag.cudagraph_unsafe)
solve_queued = _operator("solve_queued", solve_here, _fake_solve)
adjoint_queued = _operator("adjoint_queued", adjoint_here, _fake_adjoint)
stack = _operator("stack", stack_here, _fake_stack)
outputs = _operator("outputs", outputs_here, _fake_outputs)
pulled_outputs = _operator("pulled_outputs", pulled_outputs_here, _fake_pulled_outputs)


def waits(plan: Plan) -> bool:
    """Whether solves by this plan may read on the host how they went."""
    if not plan.queues:
        return plan.options.solver != "sequential"
    choice, raises = plan.choice(plan.expected_samples), plan.options.on_failure == "raise"
    return any(way.iterates and (raises or not way.queues) for way in choice.needed(needs_gradient=True))


def operators_for(plan: Plan) -> tuple[Any, Any]:
    """The operators that solve the chain of `plan` and its adjoint; which decides what CUDA graphs may hold."""
    return (solve, adjoint) if waits(plan) else (solve_queued, adjoint_queued)
