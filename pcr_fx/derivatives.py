"""The derivatives of a chain, as autograd functions around the operators and kernels that solve it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from pcr_fx import ops
from pcr_fx.batches import Batch, each_with_its_own
from pcr_fx.body import OutputProgram, wanted_among
from pcr_fx.body.isolation import is_watched_by_a_mode
from pcr_fx.planner import Plan, plan_by_key
from pcr_fx.record import record_of
from pcr_fx.tangents import Tangents
from pcr_fx.transformed import is_of_transformed_blocks
from pcr_fx.unrolled import active_of, function_of, gradients_of_function, pushforward

Function = TypeVar("Function", bound=Callable[..., Any])


def nesting(jvp: Function) -> Function:
    """A rule for tangents that has tangents itself: PyTorch runs such rules with forward mode off.

    What a call saved still has the tangents that the rule is called for; without them, what is left are those of transforms
    further out.
    """

    @functools.wraps(jvp)
    def run(ctx: Any, *given: Any) -> Any:
        if torch._C._functorch.peek_interpreter_stack() is None:  # dual numbers do not nest
            return jvp(ctx, ctx.saved_tensors, *given)
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(ctx, [forward_ad.unpack_dual(tensor, level=0).primal for tensor in ctx.saved_tensors], *given)

    return run  # type: ignore[return-value]


def unseen_by_dynamo(function: Function) -> Function:
    """A function that Dynamo runs as it is, with all that it calls: a backward within a training step that is compiled."""
    skipped = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    set_code_exec_strategy(function.__code__, skipped)  # type: ignore[attr-defined]
    return function


class Solve(torch.autograd.Function):
    """The trajectory as a differentiable function of the initial state and all operands."""

    @staticmethod
    def forward(initial: Tensor, plan: str, record: int, num_operands: int, *tensors: Tensor) -> Tensor:
        solve, _ = ops.operators_for(plan_by_key(plan))
        return solve(initial, list(tensors[:num_operands]), list(tensors[num_operands:]), plan, record)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        initial, key, ctx.record, ctx.num_operands, *tensors = inputs
        ctx.plan = plan_by_key(key)
        ctx.save_for_backward(initial, output, *tensors)
        ctx.save_for_forward(initial, *tensors)

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

    @staticmethod
    @nesting
    def jvp(ctx: Any, saved: Sequence[Tensor], d_initial: Tensor | None, *rest: Any) -> Tensor:  # type: ignore[override]
        chain = Tangents(ctx.plan, ctx.record, ctx.num_operands, saved, [d_initial, *rest[3:]])
        return chain.of_trajectory(Solve.apply)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *given: Any) -> tuple[Tensor, int]:  # type: ignore[override]
        initial, plan, record, num_operands, *tensors = given
        dims = in_dims[0], *in_dims[4:]
        many = Batch(plan_by_key(plan), record, num_operands, info.batch_size, dims, [initial, *tensors])
        return many.of_trajectory(Solve.apply)


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
        ctx.save_for_forward(*tensors)

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

    @staticmethod
    @nesting
    def jvp(  # type: ignore[override]
        ctx: Any, tensors: Sequence[Tensor], _: None, *given: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        moving = ctx.program.moving
        pairs = [
            (one, torch.zeros_like(one) if tangent is None else tangent)
            for one, tangent in zip(tensors, given, strict=True)
        ]
        active = [index for index, is_active in enumerate(ctx.program.active) if is_active]
        if not active:
            return tuple(None for _ in moving)

        def outputs(*some: Tensor) -> tuple[Tensor, ...]:
            every = dict(zip(active, some, strict=True))
            found = ctx.program.evaluate(*(every.get(index, one) for index, one in enumerate(tensors)))
            return tuple(one for one, moves in zip(found, moving, strict=True) if moves)

        primals, tangents = zip(*(pairs[index] for index in active), strict=True)
        waiting = iter(pushforward(outputs, primals, tangents)[1])
        return tuple(next(waiting) if moves else None for moves in moving)


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
    if not (watched or is_legacy_batchedtensor(cotangents)):
        found: Sequence[Tensor] = Adjoint.apply(
            initial, trajectory, cotangents, plan.key, record, num_operands, wanted or (), *tensors
        )
        return found
    # `is_grads_batched` pulls many cotangents back at once, through ops that have a rule for that.
    # A mode sees the ops of this backward, and none of the forward that was.
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        needs, primals = [True, *plan.program.wanting(wanted).differentiable], [initial, *tensors]
        evaluate = function_of(plan.program, num_operands, primals, needs)
        active = [one for one, need in zip(primals, needs, strict=True) if need]
        leaves = [tensor if twice and tensor.requires_grad else tensor.detach().requires_grad_() for tensor in active]
        if watched and not initial.requires_grad:
            leaves[0] = initial.detach()
        with _disable_current_modes() if watched else contextlib.nullcontext():
            states = evaluate(*leaves)
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = iter(torch.autograd.grad(states, asked, cotangents, allow_unused=True, create_graph=twice))
    return [next(gradients) if leaf.requires_grad else None for leaf in leaves]


class Adjoint(torch.autograd.Function):
    """The gradients of a chain, as a differentiable function themselves: their derivatives are adjoints of a chain, too."""

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
        ctx.plan = plan_by_key(key)
        ctx.wanted = wanted or ctx.plan.program.differentiable
        ctx.save_for_backward(initial, cotangents, *tensors)
        ctx.save_for_forward(initial, cotangents, *tensors)

    @staticmethod
    @unseen_by_dynamo
    def backward(ctx: Any, *seconds: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        initial, cotangents, *tensors = ctx.saved_tensors
        waiting = iter(seconds[1:])
        moving = [seconds[0], *(next(waiting) if need else None for need in ctx.wanted)]
        program, count = ctx.plan.program.wanting(ctx.wanted), ctx.num_operands
        record, chain = record_of(ctx.record), None
        if is_of_transformed_blocks(ctx.plan) or ctx.plan.serves_twice(ctx.plan.samples(initial)):
            chain = Tangents(ctx.plan, ctx.record, count, [initial, *tensors], moving)
        if chain is None or chain.found is None:
            # Later calls are left to the model's own ops.
            record.is_differentiated_twice = True
            gradients = gradients_of_function(program, count, initial, tensors)
            d_cotangents, *found = torch.func.vjp(gradients, cotangents, *active_of(initial, tensors))[1](
                tuple(seconds)
            )
            needs = ctx.plan.program.differentiable
        else:
            d_cotangents, found = chain.of_gradients(cotangents, None, ctx.wanted, Solve.apply, Adjoint.apply)
            needs = ctx.wanted
        rest = iter(found[1:])
        # The trajectory is a function of the other inputs.
        return found[0], None, d_cotangents, None, None, None, None, *(next(rest) if need else None for need in needs)

    @staticmethod
    @nesting
    def jvp(ctx: Any, saved: Sequence[Tensor], *given: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        initial, cotangents, *tensors = saved
        moving, count = [given[0], *given[7:]], ctx.num_operands
        chain = Tangents(ctx.plan, ctx.record, count, [initial, *tensors], moving)
        if chain.found is not None:
            return tuple(chain.of_gradients(cotangents, given[2], ctx.wanted, Solve.apply, Adjoint.apply)[1])
        gradients = gradients_of_function(ctx.plan.program.wanting(ctx.wanted), count, initial, tensors)
        primals = [cotangents, *active_of(initial, tensors)]
        active = [
            given[2],
            *(t for p, t in zip((initial, *tensors), moving, strict=True) if p.is_floating_point() or p.is_complex()),
        ]
        zeroed = [torch.zeros_like(p) if t is None else t for p, t in zip(primals, active, strict=True)]
        return pushforward(gradients, primals, zeroed)[1]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *given: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:  # type: ignore[override]
        initial, *along, key, record, num_operands, wanted = given[:7]
        plan, size = plan_by_key(key), info.batch_size
        dims = in_dims[0], *in_dims[7:]
        own = each_with_its_own(plan, wanted, size, dims, [initial, *given[7:]])
        return Batch(plan, record, num_operands, size, *own).of_gradients(along, in_dims[1:3], wanted, Adjoint.apply)
