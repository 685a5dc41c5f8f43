"""The derivatives of a chain, as autograd functions around the operators and kernels that solve it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from pcr_fx import ops
from pcr_fx.body import OutputProgram, Program, wanted_among
from pcr_fx.body.isolation import is_watched_by_a_mode
from pcr_fx.planner import Plan, plan_by_key
from pcr_fx.record import record_of
from pcr_fx.ways import evaluate

Function = TypeVar("Function", bound=Callable[..., Any])


def unseen_by_dynamo(function: Function) -> Function:
    """A function that Dynamo runs as it is, with all that it calls: a backward within a training step that is compiled."""
    skipped = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    set_code_exec_strategy(function.__code__, skipped)  # type: ignore[attr-defined]
    return function


class Solve(torch.autograd.Function):
    """The trajectory as a differentiable function of the initial state and all operands."""

    generate_vmap_rule = True

    @staticmethod
    def forward(initial: Tensor, plan: str, record: int, num_operands: int, *tensors: Tensor) -> Tensor:
        solve, _ = ops.operators_for(plan_by_key(plan))
        return solve(initial, list(tensors[:num_operands]), list(tensors[num_operands:]), plan, record)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        initial, key, ctx.record, ctx.num_operands, *tensors = inputs
        ctx.plan = plan_by_key(key)
        ctx.save_for_backward(initial, output, *tensors)

    @staticmethod
    @unseen_by_dynamo
    def backward(ctx: Any, cotangents: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        initial, trajectory, *tensors = ctx.saved_tensors
        program = ctx.plan.program
        wanted = wanted_among(program.differentiable, ctx.needs_input_grad[4:])
        needs, saved = program.wanting(wanted).differentiable, (initial, trajectory, cotangents, tensors)
        d_initial, *rest = gradients_of(ctx.plan, ctx.record, ctx.num_operands, *saved, wanted)
        waiting = iter(rest)
        return d_initial, None, None, None, *(next(waiting) if need else None for need in needs)


class Outputs(torch.autograd.Function):
    """The outputs of all blocks as a differentiable function of the states and all operands."""

    generate_vmap_rule = True

    @staticmethod
    def forward(program: OutputProgram, *tensors: Tensor) -> tuple[Tensor, ...]:
        if _is_looked_on():
            return tuple(ops.outputs(list(tensors), program.key))
        return tuple(program.evaluate(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.program, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(one for one, moves in zip(output, ctx.program.moving, strict=True) if not moves))
        ctx.save_for_backward(*tensors)

    @staticmethod
    @unseen_by_dynamo
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        program: OutputProgram = ctx.program
        tensors, active = ctx.saved_tensors, program.active
        if all(one is None for one in given):
            return (None,) * (1 + len(active))
        cotangents = [
            tensors[0].new_zeros(spec.shape, dtype=spec.dtype) if one is None else one
            for one, spec in zip(given, program.specs, strict=True)
            if spec.is_differentiable
        ]
        # Differentiated in turn, it is made of ops that can be; nobody does so within a compiler.
        if _is_looked_on() and not torch.is_grad_enabled():
            pulled = iter(ops.pulled_outputs(list(tensors), cotangents, program.key))
        else:
            pulled = iter(program.pullback(*tensors, *cotangents))
        return None, *(next(pulled) if is_active else None for is_active in active)


def _is_looked_on() -> bool:
    """Whether a compiler or another mode sees each op."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def gradients_of(
    plan: Plan,
    record: int,
    num_operands: int,
    initial: Tensor,
    trajectory: Tensor,
    cotangents: Tensor,
    tensors: Sequence[Tensor],
    wanted: tuple[bool, ...] | None = None,
) -> Sequence[Tensor | None]:
    """Those of the initial state, then of the operands and shared operands that have any and are wanted."""
    watched = is_watched_by_a_mode()
    if not (watched or is_legacy_batchedtensor(cotangents) or _has_tangent(cotangents)):
        found: Sequence[Tensor] = _Adjoint.apply(
            initial, trajectory, cotangents, plan.key, record, num_operands, wanted or (), *tensors
        )
        return found
    # `is_grads_batched` pulls many cotangents back at once, through ops that have a rule for that; so have they for tangents.
    # A mode sees the ops of this backward, and none of the forward that was.
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        active, evaluate = _unrolling(plan.program.wanting(wanted), num_operands, [initial, *tensors])
        leaves = [tensor if twice and tensor.requires_grad else tensor.detach().requires_grad_() for tensor in active]
        if watched and not initial.requires_grad:
            leaves[0] = initial.detach()
        with _disable_current_modes() if watched else contextlib.nullcontext():
            states = evaluate(*leaves)
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = iter(torch.autograd.grad(states, asked, cotangents, allow_unused=True, create_graph=twice))
    return [next(gradients) if leaf.requires_grad else None for leaf in leaves]


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def _unrolling(
    program: Program, num_operands: int, primals: Sequence[Tensor]
) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """Those of a chain's inputs that have gradients, and the trajectory as a function of them, in the model's own ops."""
    needs = [True, *program.differentiable]

    def trajectory(*active: Tensor) -> Tensor:
        waiting = iter(active)
        every = [next(waiting) if need else fixed for need, fixed in zip(needs, primals, strict=True)]
        return unrolled(program, every[0], every[1 : 1 + num_operands], every[1 + num_operands :])

    return [primal for primal, need in zip(primals, needs, strict=True) if need], trajectory


class _Adjoint(torch.autograd.Function):
    """The gradients of a chain, as a differentiable function themselves.

    Nobody differentiates a gradient twice for speed, so this second derivative runs block by block.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        initial: Tensor,
        trajectory: Tensor,
        cotangents: Tensor,
        plan: str,
        record: int,
        num_operands: int,
        wanted: tuple[bool, ...],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        operands, shared = list(tensors[:num_operands]), list(tensors[num_operands:])
        _, adjoint = ops.operators_for(plan_by_key(plan))
        return tuple(adjoint(initial, trajectory, operands, shared, cotangents, plan, record, list(wanted)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        initial, _, cotangents, key, ctx.record, ctx.num_operands, wanted, *tensors = inputs
        ctx.program = plan_by_key(key).program.wanting(wanted or None)
        ctx.save_for_backward(initial, cotangents, *tensors)

    @staticmethod
    @unseen_by_dynamo
    def backward(ctx: Any, *seconds: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        initial, cotangents, *tensors = ctx.saved_tensors
        record_of(ctx.record).is_differentiated_twice = True
        program = ctx.program
        needs = [True, *program.differentiable]
        active, trajectory = _unrolling(program, ctx.num_operands, [initial, *tensors])

        def gradients(cotangents: Tensor, *active: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(trajectory, *active)[1](cotangents)

        d_cotangents, *d_active = torch.func.vjp(gradients, cotangents, *active)[1](tuple(seconds))
        waiting = iter(d_active)
        d_initial, *d_tensors = (next(waiting) if need else None for need in needs)
        # The trajectory is a function of the other inputs, which `unrolled` computes again.
        return d_initial, None, d_cotangents, None, None, None, None, *d_tensors


def unrolled(program: Program, initial: Tensor, operands: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
    """The trajectory `[L, *batch, d]` block by block, in the model's own ops, which any transform can differentiate."""
    layout = program.layout
    trajectory = evaluate(program.chain, layout.unflatten(initial), operands, shared)
    return torch.stack([layout.flatten(states) for states in trajectory.values()])
