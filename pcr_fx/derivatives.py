"""The derivatives of a chain, as autograd functions around the operators and kernels that solve it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from pcr_fx import ops
from pcr_fx.body import OutputProgram, Program, StateLayout
from pcr_fx.body.isolation import is_plain_call, is_watched_by_a_mode
from pcr_fx.call import Call
from pcr_fx.chain import Leaving
from pcr_fx.planner import Plan, Watch, plan_by_key
from pcr_fx.record import SolveRecord, record_of
from pcr_fx.targets import PointerTable
from pcr_fx.ways import Native, evaluate

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
        needs = [*program.differentiable_operands, *program.differentiable_shared]
        d_initial, *rest = _gradients(ctx.plan, ctx.record, ctx.num_operands, initial, trajectory, cotangents, tensors)
        waiting = iter(rest)
        return d_initial, None, None, None, *(next(waiting) if need else None for need in needs)


class Back(NamedTuple):
    """The way back of a call, what times some of them, and what is to be done where they take another time than they should."""

    way: Native
    watch: Watch | None
    doubt: Callable[[], None]

    def pull(self, record: SolveRecord, call: Call, *given: Any) -> tuple[Tensor, Sequence[Tensor]]:
        """The gradients of the initial state, and of what else is differentiable, by native code.

        Args:
            given: the trajectory, then cotangents, as the kernel takes them.
        """
        trajectory, cotangents, *results = given
        began = perf_counter() if self.watch is not None and self.watch.begins() else None
        d_initial, *rest = self.way.kernel.solve_adjoint(call, trajectory, cotangents, self.way.threads, *results)
        if began is not None and self.watch.ended(perf_counter() - began):  # type: ignore[union-attr]
            self.doubt()
        record.backward(self.way.solver, False)
        return d_initial, rest


def is_plain_backward(given: Iterable[Tensor | None]) -> bool:
    """Whether native code may pull these back: not where a gradient is differentiated in turn, or many are taken at once."""
    single = all(one is None or (type(one) is Tensor and not is_legacy_batchedtensor(one)) for one in given)
    return single and not torch.is_grad_enabled() and is_plain_call()


def tensors_of(operands: Sequence[Tensor | PointerTable]) -> list[Tensor]:
    """The tensors of operands, which autograd is to know; of those read in place the blocks' own."""
    return [one for each in operands for one in (each.tensors if isinstance(each, PointerTable) else (each,))]


class KernelSolve(torch.autograd.Function):
    """`Solve` by native code, for plain calls: less than half of what `Solve` and its operators cost.

    Returns what leaves the chain: the trajectory if any state is taken whole, then the taps. Of operands read in place the
    blocks' own tensors are inputs, and get their gradients as views of one: to stack thousands, and take the gradient
    apart again, in autograd would double the cost.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        plan: Plan,
        way: Native,
        back: Back,
        record: SolveRecord,
        leaving: Leaving,
        operands: Sequence[Tensor | PointerTable],
        shared: Sequence[Tensor],
        initial: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """`tensors`: the operands, tables as their tensors, then the shared operands."""
        ctx.plan, ctx.back, ctx.record, ctx.leaving = plan, back, record, leaving
        ctx.set_materialize_grads(False)
        trajectory = way.kernel.solve(plan.program.call_with(initial, operands, shared), way.threads)
        if any(ctx.needs_input_grad):
            ctx.inputs = SavedInputs(operands, len(shared))
            ctx.save_for_backward(initial, trajectory, *(t for t in operands if isinstance(t, Tensor)), *shared)
        taken = tapped(plan.program.layout, trajectory, leaving.taps)
        return (trajectory, *taken) if leaving.whole else taken

    @staticmethod
    @unseen_by_dynamo
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Any, ...]:
        if all(part is None for part in given):
            return (None,) * len(ctx.needs_input_grad)
        initial, trajectory, *saved = ctx.saved_tensors
        plan, back = ctx.plan, ctx.back
        program = plan.program
        among = cotangents_of(program.layout, initial, ctx.leaving, given)
        rest: Sequence[Tensor | None]
        plain = is_plain_backward(among.values() if isinstance(among, dict) else (among,))
        if plain and back.way.is_ready("backward", initial):
            operands, shared = ctx.inputs.in_place(saved)
            d_initial, rest = back.pull(ctx.record, program.call_with(initial, operands, shared), trajectory, among)
        else:
            # Second derivatives have no kernel: later calls are left to the model's own ops.
            ctx.record.is_differentiated_twice |= torch.is_grad_enabled()
            stacked = ctx.inputs.stacked(saved)
            if isinstance(among, dict):
                zero = torch.zeros_like(initial)
                dense = torch.stack([among.get(block, zero) for block in range(program.length)])
            else:
                dense = among
            count = program.chain.num_operands
            d_initial, *rest = _gradients(plan, ctx.record.id, count, initial, trajectory, dense, stacked)
        waiting = iter(rest)
        needs = [*program.differentiable_operands, *program.differentiable_shared]
        gradients = [next(waiting) if need else None for need in needs]
        return None, None, None, None, None, None, None, d_initial, *ctx.inputs.spread(gradients)


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


class SavedInputs:
    """The operands of a call for its backward: as autograd saves them, but for those read in place.

    Those are thousands; that none was written to in between is seen by their versions.
    """

    def __init__(self, operands: Sequence[Tensor | PointerTable], num_shared: int) -> None:
        self.tables = [operand if isinstance(operand, PointerTable) else None for operand in operands]
        self.num_shared = num_shared
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        return [tensor._version for table in self.tables if table is not None for tensor in table.tensors]

    def _check(self) -> None:
        if self._versions() != self.versions:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                "a parameter of a chain, between its forward and its backward"
            )

    def _merged(self, saved: Sequence[Tensor]) -> list[Tensor | PointerTable]:
        self._check()
        waiting = iter(saved)
        return [next(waiting) if table is None else table for table in self.tables]

    def in_place(self, saved: Sequence[Tensor]) -> tuple[list[Tensor | PointerTable], list[Tensor]]:
        """Operands for a kernel, and the shared operands."""
        operands = [
            torch.stack(operand.tensors) if isinstance(operand, PointerTable) and not operand.holds() else operand
            for operand in self._merged(saved)
        ]
        return operands, list(saved[len(saved) - self.num_shared :])

    def stacked(self, saved: Sequence[Tensor]) -> list[Tensor]:
        """Every operand as one tensor, then the shared operands."""
        operands = [
            torch.stack(operand.tensors) if isinstance(operand, PointerTable) else operand
            for operand in self._merged(saved)
        ]
        return [*operands, *saved[len(saved) - self.num_shared :]]

    def spread(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of all inputs, from those of operands and shared operands."""
        spread: list[Tensor | None] = []
        for index, gradient in enumerate(gradients):
            table = self.tables[index] if index < len(self.tables) else None
            if table is None:
                spread.append(gradient)
            else:
                spread += [None] * len(table.tensors) if gradient is None else gradient.unbind(0)
        return spread


def tapped(layout: StateLayout, trajectory: Tensor, taps: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    """The states at `taps`, copied: a view would keep the trajectory alive, and pass writes to it on to the backward."""
    return tuple([layout.unflatten(trajectory[block])[index].clone() for index, block in taps])


def cotangents_of(
    layout: StateLayout, initial: Tensor, leaving: Leaving, given: Sequence[Tensor | None]
) -> Tensor | dict[int, Tensor]:
    """Those of all states, `[L, *batch, d]`, or by block where only few have any.

    Args:
        given: those of what `KernelSolve` returned.
    """
    among = _by_block(layout, initial, leaving.taps, given[1:] if leaving.whole else given)
    dense = given[0] if leaving.whole else None
    if dense is None:
        return among
    if among:
        # Out of place, since gradients may be differentiated in turn.
        blocks = torch.tensor(list(among), device=dense.device)
        dense = dense.index_add(0, blocks, torch.stack(list(among.values())))
    return dense


def _by_block(
    layout: StateLayout, initial: Tensor, taps: Sequence[tuple[int, int]], given: Sequence[Tensor | None]
) -> dict[int, Tensor]:
    """The cotangents of the states at `taps`, of those blocks that have any, each `[*batch, d]`."""
    if layout.is_flat:
        return {block: part for (_, block), part in zip(taps, given, strict=True) if part is not None}
    blocks: dict[int, dict[int, Tensor]] = {}
    for (index, block), part in zip(taps, given, strict=True):
        if part is not None:
            blocks.setdefault(block, {})[index] = part
    zeros = layout.unflatten(torch.zeros_like(initial))
    return {
        block: layout.flatten([parts.get(index, zero) for index, zero in enumerate(zeros)])
        for block, parts in blocks.items()
    }


def _gradients(
    plan: Plan,
    record: int,
    num_operands: int,
    initial: Tensor,
    trajectory: Tensor,
    cotangents: Tensor,
    tensors: Sequence[Tensor],
) -> Sequence[Tensor | None]:
    """Those of the initial state, then of the operands and shared operands that have any."""
    watched = is_watched_by_a_mode()
    if not (watched or is_legacy_batchedtensor(cotangents) or _has_tangent(cotangents)):
        found: Sequence[Tensor] = _Adjoint.apply(
            initial, trajectory, cotangents, plan.key, record, num_operands, *tensors
        )
        return found
    # `is_grads_batched` pulls many cotangents back at once, through ops that have a rule for that; so have they for tangents.
    # A mode sees the ops of this backward, and none of the forward that was.
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        active, evaluate = _unrolling(plan.program, num_operands, [initial, *tensors])
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
    needs = [True, *program.differentiable_operands, *program.differentiable_shared]

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
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        operands, shared = list(tensors[:num_operands]), list(tensors[num_operands:])
        _, adjoint = ops.operators_for(plan_by_key(plan))
        return tuple(adjoint(initial, trajectory, operands, shared, cotangents, plan, record))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        initial, _, cotangents, key, ctx.record, ctx.num_operands, *tensors = inputs
        ctx.program = plan_by_key(key).program
        ctx.save_for_backward(initial, cotangents, *tensors)

    @staticmethod
    @unseen_by_dynamo
    def backward(ctx: Any, *seconds: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        initial, cotangents, *tensors = ctx.saved_tensors
        record_of(ctx.record).is_differentiated_twice = True
        program = ctx.program
        needs = [True, *program.differentiable_operands, *program.differentiable_shared]
        active, trajectory = _unrolling(program, ctx.num_operands, [initial, *tensors])

        def gradients(cotangents: Tensor, *active: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(trajectory, *active)[1](cotangents)

        d_cotangents, *d_active = torch.func.vjp(gradients, cotangents, *active)[1](tuple(seconds))
        waiting = iter(d_active)
        d_initial, *d_tensors = (next(waiting) if need else None for need in needs)
        # The trajectory is a function of the other inputs, which `unrolled` computes again.
        return d_initial, None, d_cotangents, None, None, None, *d_tensors


def unrolled(program: Program, initial: Tensor, operands: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
    """The trajectory `[L, *batch, d]` block by block, in the model's own ops, which any transform can differentiate."""
    layout = program.layout
    trajectory = evaluate(program.chain, layout.unflatten(initial), operands, shared)
    return torch.stack([layout.flatten(states) for states in trajectory.values()])
