"""The operators that a solve node calls: tensors in, tensors out, opaque to every compiler.

They have no autograd formula of their own (`derivatives.py` holds it): an operator with `register_autograd` returns zero
tangents under forward-mode differentiation without a word.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pcr_fx.body import Program
from pcr_fx.call import Call
from pcr_fx.errors import SolveError, UnsupportedError
from pcr_fx.planner import Plan, Way, plan_by_key
from pcr_fx.record import SolveRecord, place_of, record_of
from pcr_fx.solvers import (
    Outcome,
    Settings,
    SolveStats,
    adjoint_sequential,
    adjoint_transposed,
    solve_iteratively,
    solve_sequential,
)
from pcr_fx.targets import CppKernel, TritonKernel

log = logging.getLogger(__name__)


def solve_here(initial: Tensor, operands: Sequence[Tensor], shared: Sequence[Tensor], plan: str, record: int) -> Tensor:
    """The trajectory `[L, *batch, d]` of the chain that `plan` names, from `initial` `[*batch, d]`."""
    with torch.autocast(initial.device.type, enabled=False), torch.cuda.device_of(initial):
        named = plan_by_key(plan)
        return _solve(Call(initial, [*operands, *named.program.literals], shared), named, record_of(record))


def _solve(call: Call, plan: Plan, record: SolveRecord) -> Tensor:
    program, initial = plan.program, call.initial
    samples = plan.samples(initial)
    if plan.wants_another_look(samples):
        plan.measure(call, needs_gradient=False, with_eager=False)
    choice = plan.choice(samples)
    way = choice.forward
    if isinstance(way.kernel, TritonKernel):
        return _solve_on_gpu(way.kernel, way.solver, call, plan, record)
    if way.solver == "sequential":
        record.forward(way.solver, SolveStats(Outcome.SEQUENTIAL))
        return solve_block_by_block(program, call, way.kernel)
    if plan.options.on_failure == "fallback" and not record.rest.passes():
        record.forward("sequential", SolveStats(Outcome.SEQUENTIAL))
        return solve_block_by_block(program, call, plan.fallback_kernel(samples))
    settings = replace(plan.settings, window=way.window)
    start = _start(initial, plan, record)
    trajectory, stats = iterate(program, call, way.solver, settings, way.kernel, start)
    if stats.outcome.success:
        record.rest.succeeded()
        if plan.options.start == "previous":
            record.remember(trajectory.clone())
    else:
        if plan.options.on_failure == "raise":  # the report tells of it all the same
            record.forward(way.solver, stats)
        stats = _failed(stats, way, plan, record)
        record.rest.failed()
        trajectory = solve_block_by_block(program, call, plan.fallback_kernel(samples))
    plan.learn(samples, stats)
    record.forward(way.solver, stats)
    return _owned([trajectory], [initial, *call.operands, *call.shared])[0]


def solve_block_by_block(program: Program, call: Call, kernel: CppKernel | None) -> Tensor:
    if kernel is not None and kernel.is_ready("forward", call.initial):
        return kernel.solve(call)
    return solve_sequential(program, call)


def iterate(
    program: Program, call: Call, solver: str, settings: Settings, kernel: CppKernel | None, start: Tensor | None
) -> tuple[Tensor, SolveStats]:
    if kernel is not None and start is None and call.initial.numel() and kernel.is_ready("newton", call.initial):
        limit = settings.limit(solver, program.length)
        trajectory, outcome, iterations, last = kernel.solve_newton(call, settings.tolerance, limit)
        return trajectory, SolveStats(Outcome[outcome], iterations, last)
    return solve_iteratively(program, call, solver, settings, start)


def _start(initial: Tensor, plan: Plan, record: SolveRecord) -> Tensor | None:
    """The trajectory to start from, if there is one better than the initial state repeated."""
    if plan.options.start != "previous":
        return None
    return record.trajectories.get(place_of(initial))


def _solve_on_gpu(
    kernel: TritonKernel,
    solver: str,
    call: Call,
    plan: Plan,
    record: SolveRecord,
) -> Tensor:
    """Nothing here waits for the GPU, unless a failure is to raise."""
    if solver == "sequential":
        record.forward(solver, SolveStats(Outcome.SEQUENTIAL))
        return kernel.solve(call)
    raises = plan.options.on_failure == "raise"
    settings, length = plan.settings, plan.program.length
    trajectory, stats = kernel.solve_newton(
        call, settings.tolerance, settings.limit(solver, length), fall_back=not raises
    )
    record.queued(solver, stats)
    if raises and (last := record.last) is not None and not last.outcome.success:
        _failed(last, Way(solver, kernel), plan, record)
    return trajectory


def _failed(stats: SolveStats, way: Way, plan: Plan, record: SolveRecord) -> SolveStats:
    solver = "Newton" if way.solver == "newton" else way.solver
    message = (
        f"{record.name}: {solver} did not solve the chain of {plan.program.length} blocks: {stats.outcome} "
        f"(residual {stats.residual:.2e}, tolerance {plan.settings.tolerance:.2e}, {stats.iterations} iterations)"
    )
    if plan.options.on_failure == "raise":
        raise SolveError(message)
    # Once loudly; a training run that falls back at every step would fill the log.
    log.log(logging.DEBUG if record.fallbacks else logging.WARNING, "%s; evaluated sequentially instead", message)
    return SolveStats(Outcome.SEQUENTIAL, stats.iterations, 0.0, fallback=stats.outcome)


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
) -> list[Tensor]:
    """Cotangents `[d_initial, *d_operands, *d_shared]`, of floating and complex operands only, in this order."""
    with torch.autocast(initial.device.type, enabled=False), torch.cuda.device_of(initial):
        named = plan_by_key(plan)
        call = Call(initial, [*operands, *named.program.literals], shared)
        return _adjoint(call, trajectory, cotangents, named, record_of(record))


def _adjoint(call: Call, trajectory: Tensor, cotangents: Tensor, plan: Plan, record: SolveRecord) -> list[Tensor]:
    program, (initial, operands, shared) = plan.program, call
    samples = plan.samples(initial)
    way, fallback = plan.choice(samples).backward, False
    result: Sequence[Tensor]
    if isinstance(way.kernel, TritonKernel):
        # Where the reduction is not accurate, the kernels go block by block on their own.
        result, _ = way.kernel.solve_adjoint(call, trajectory, cotangents, way.solver)
        record.backward(way.solver, False)
        return _owned(result, [initial, trajectory, *operands, *shared, cotangents])
    solver = way.solver
    if solver != "sequential" and plan.options.on_failure == "fallback" and not record.rest_backward.passes():
        solver = "sequential"
    if solver == "newton":
        method = plan.options.linear_solver
        result, accurate = adjoint_transposed(program, call, trajectory, cotangents, method, way.window)
        fallback = not accurate
        if fallback:
            _failed_adjoint(plan, record)
            record.rest_backward.failed()
        else:
            record.rest_backward.succeeded()
    if solver == "sequential" or fallback:
        kernel = plan.fallback_kernel(samples) if way.solver == "newton" else way.kernel
        if kernel is not None and kernel.is_ready("adjoint", initial):
            result = kernel.solve_adjoint(call, trajectory, cotangents)
        else:
            result = adjoint_sequential(program, call, trajectory, cotangents)
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


def _fake_adjoint(
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


def waits(plan: Plan) -> bool:
    """Whether solves by this plan may read on the host how they went."""
    if not isinstance(plan.kernel, TritonKernel):
        return plan.options.solver != "sequential"
    choice = plan.choice(plan.expected_samples)
    iterates = [way for way in (choice.forward, choice.backward) if way.solver != "sequential"]
    raises = plan.options.on_failure == "raise"
    return any(raises or not isinstance(way.kernel, TritonKernel) for way in iterates)


def operators_for(plan: Plan) -> tuple[Any, Any]:
    """The operators that solve the chain of `plan` and its adjoint; which decides what CUDA graphs may hold."""
    return (solve, adjoint) if waits(plan) else (solve_queued, adjoint_queued)
