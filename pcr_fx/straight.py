"""Plain calls of a chain, past all operators straight to native code: forward, and back.

Most of what an operator costs is asking who else wants to know. Here nobody does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor, unwrap_if_dead

from pcr_fx.body import StateLayout, wanted_among
from pcr_fx.body.isolation import is_plain_call
from pcr_fx.call import Call
from pcr_fx.chain import Leaving
from pcr_fx.derivatives import gradients_of, unseen_by_dynamo
from pcr_fx.operands import is_plain
from pcr_fx.planner import Plan, Watch
from pcr_fx.record import SolveRecord
from pcr_fx.targets import PointerTable
from pcr_fx.targets.cpp.memory import copied_block
from pcr_fx.ways import IN_SEQUENCE, Native


class Back(NamedTuple):
    """The way back of a call, what times some of them, and what is to be done where they take another time than they should;
    and whether it does more than was measured.
    """

    way: Native
    watch: Watch | None
    doubt: Callable[[], None]
    has_more: bool = False

    def pull(
        self, record: SolveRecord, call: Call, wanted: tuple[bool, ...] | None, *given: Any
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The gradients of the initial state, and of what else is differentiable and wanted, by native code.

        Args:
            wanted: whose, of operands and shared operands; `None` for all.
            given: the trajectory, then cotangents, as the kernel takes them.
        """
        trajectory, cotangents, *more = given
        results = more[0] if more else ()
        began = perf_counter() if self.watch is not None and self.watch.begins() else None
        d_initial, *rest = self.way.kernel.solve_adjoint(
            call, trajectory, cotangents, self.way.threads, results, wanted
        )
        if began is not None and self.watch.ended(perf_counter() - began, self.has_more):  # type: ignore[union-attr]
            self.doubt()
        record.backward(self.way.solver, False)
        return d_initial, rest


class Straight:
    """How calls with tensors of some shapes and dtypes go straight to native code.

    Args:
        plan: of the chain.
        way: forward.
        back: and back.
        record: of the node.
        leaving: what is taken of the trajectory.
    """

    def __init__(self, plan: Plan, way: Native, back: Back, record: SolveRecord, leaving: Leaving) -> None:
        self.plan, self.way, self.back, self.record, self.leaving = plan, way, back, record, leaving
        self.program = plan.program
        self.layout, self.literals, self.length = self.program.layout, self.program.literals, self.program.length
        self.is_flat = self.layout.is_flat
        self.needs = self.program.differentiable
        self._ready_back = set[tuple[bool, ...] | None]()

    def run(
        self, states: Sequence[Tensor], operands: Sequence[Tensor | PointerTable], shared: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """What leaves the solve: the trajectories that are taken whole, then the taps.

        Args:
            states: the initial states, plain tensors as all others.
            operands: as kernels take them.
        """
        # What a function transform that is over has left behind holds an ordinary tensor.
        initial = unwrap_if_dead(states[0] if self.is_flat else self.layout.flatten(states))
        shared = [unwrap_if_dead(tensor) for tensor in shared]
        operands = [unwrap_if_dead(one) if isinstance(one, Tensor) else one for one in operands]
        self.record.forward(self.way.solver, IN_SEQUENCE)
        if torch.is_grad_enabled():
            tensors = [initial, *tensors_of(operands), *shared]
            if any(map(_requires_grad, tensors)):
                solved: tuple[Tensor, ...] = _apply(self, operands, shared, *tensors)
                return self._apart(solved[0], solved[1:]) if self.leaving.whole else solved
        call = Call(initial, [*operands, *self.literals], shared, self.length)
        if not self.leaving.whole:
            return self._states_at(call)
        trajectory = self.way.kernel.solve(call, self.way.threads)
        return self._apart(trajectory, tapped(self.layout, trajectory, self.leaving.taps))

    def _apart(self, trajectory: Tensor, taken: Sequence[Tensor]) -> tuple[Tensor, ...]:
        trajectories = self.layout.unflatten(trajectory, leading=1)
        return (*(trajectories[index] for index in self.leaving.whole), *taken)

    def _states_at(self, call: Call) -> tuple[Tensor, ...]:
        """The taps, where nothing looks at the other states: no memory is taken for them."""
        blocks, taps = self.leaving.blocks, self.leaving.taps
        kept = self.way.kernel.solve_states(call, blocks, self.way.threads)
        if self.is_flat and len(taps) == 1:
            return (kept[0],)  # nobody else has it
        return tuple([self.layout.unflatten(kept[blocks.index(block)])[index].clone() for index, block in taps])

    def takes(self, given: Sequence[Tensor | None], initial: Tensor, wanted: tuple[bool, ...] | None) -> bool:
        """Whether native code pulls these cotangents back to what is wanted; it is compiled now, if it is not yet."""
        if not is_plain_backward(given):
            return False
        if wanted not in self._ready_back and self.back.way.is_ready("backward", initial, wanted):
            self._ready_back.add(wanted)
        return wanted in self._ready_back


def is_plain_backward(given: Iterable[Tensor | None]) -> bool:
    """Whether native code may pull these back: not where a gradient is differentiated in turn, or many are taken at once, nor
    where memory holds the negatives of a cotangent's numbers, as of the imaginary parts of conjugates.
    """
    single = all(one is None or (is_plain(one) and not is_legacy_batchedtensor(one)) for one in given)
    return single and not torch.is_grad_enabled() and is_plain_call()


def tensors_of(operands: Sequence[Tensor | PointerTable]) -> list[Tensor]:
    """The tensors of operands, which autograd is to know; of those read in place the blocks' own."""
    tensors: list[Tensor] = []
    for one in operands:
        if type(one) is PointerTable:
            tensors += one.tensors
        else:
            tensors.append(one)  # type: ignore[arg-type]
    return tensors


class KernelSolve(torch.autograd.Function):
    """`Solve` by native code, for plain calls: less than half of what `Solve` and its operators cost.

    Returns what leaves the chain: the trajectory if any state is taken whole, then the taps. Of operands read in place the
    blocks' own tensors are inputs, and get their gradients as views of one: to stack thousands, and take the gradient
    apart again, in autograd would double the cost.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        straight: Straight,
        operands: Sequence[Tensor | PointerTable],
        shared: Sequence[Tensor],
        initial: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """`tensors`: the operands, tables as their tensors, then the shared operands. One of all requires a gradient."""
        ctx.straight, ctx.inputs = straight, SavedInputs(operands, len(shared))
        ctx.set_materialize_grads(False)
        call = Call(initial, [*operands, *straight.literals], shared, straight.length)
        trajectory = straight.way.kernel.solve(call, straight.way.threads)
        ctx.save_for_backward(initial, trajectory, *ctx.inputs.to_save(operands), *shared)
        taken = tapped(straight.layout, trajectory, straight.leaving.taps)
        return (trajectory, *taken) if straight.leaving.whole else taken

    @staticmethod
    @unseen_by_dynamo
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Any, ...]:
        straight: Straight = ctx.straight
        if all(part is None for part in given):
            return (None,) * len(ctx.needs_input_grad)
        initial, trajectory, *saved = ctx.saved_tensors
        wanted = wanted_among(straight.needs, ctx.inputs.asked(ctx.needs_input_grad[4:]))
        rest: Sequence[Tensor | None]
        if straight.takes(given, initial, wanted):
            among = cotangents_of(straight.layout, initial, straight.leaving, given)
            operands, shared = ctx.inputs.in_place(saved)
            call = Call(initial, [*operands, *straight.literals], shared, straight.length)
            d_initial, rest = straight.back.pull(straight.record, call, wanted, trajectory, among)
        else:
            tensors = ctx.inputs.stacked(saved)
            d_initial, *rest = _by_ops(straight, initial, trajectory, tensors, given, wanted)  # type: ignore[assignment]
        waiting = iter(rest)
        gradients = [next(waiting) if need else None for need in wanted or straight.needs]
        return None, None, None, d_initial, *ctx.inputs.spread(gradients)


# As `Function.apply` calls it where no function transform is on; that looks through all arguments first, thousands of
# parameters among them, for what transforms have left behind.
_apply = super(torch.autograd.Function, KernelSolve).apply  # type: ignore[misc]
_requires_grad = attrgetter("requires_grad")
_version = attrgetter("_version")


def _by_ops(
    straight: Straight,
    initial: Tensor,
    trajectory: Tensor,
    tensors: Sequence[Tensor],
    given: Sequence[Tensor | None],
    wanted: tuple[bool, ...] | None,
) -> Sequence[Tensor | None]:
    """The gradients where a backward is looked on at, or differentiated in turn."""
    program, record = straight.program, straight.record
    among = cotangents_of(straight.layout, initial, straight.leaving, given)
    if isinstance(among, dict):
        zero = torch.zeros_like(initial)
        among = torch.stack([among.get(block, zero) for block in range(program.length)])
    saved = initial, trajectory, among, tensors
    return gradients_of(straight.plan, record.id, program.chain.num_operands, *saved, wanted)


class SavedInputs:
    """The operands of a call for its backward: as autograd saves them, but for those read in place.

    Those are thousands; that none was written to in between is seen by their versions.
    """

    def __init__(self, operands: Sequence[Tensor | PointerTable], num_shared: int) -> None:
        self.tables = [operand if type(operand) is PointerTable else None for operand in operands]
        self.num_shared = num_shared
        self.has_tables = any(self.tables)
        self.versions = self._versions() if self.has_tables else []

    def asked(self, needed: Sequence[bool]) -> Sequence[bool]:
        """For each operand and shared operand whether its gradient is, from whether that of each input is."""
        if not self.has_tables:
            return needed
        asked, at = [], 0
        for table in (*self.tables, *(None for _ in range(self.num_shared))):
            end = at + (1 if table is None else len(table.tensors))
            asked.append(any(needed[at:end]))
            at = end
        return asked

    def to_save(self, operands: Sequence[Tensor | PointerTable]) -> Sequence[Any]:
        """Those that autograd saves."""
        return [one for one in operands if type(one) is not PointerTable] if self.has_tables else operands

    def _versions(self) -> list[list[int]]:
        return [list(map(_version, table.tensors)) for table in self.tables if table is not None]

    def _check(self) -> None:
        if self._versions() != self.versions:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                "a parameter of a chain, between its forward and its backward"
            )

    def _merged(self, saved: Sequence[Tensor]) -> Sequence[Tensor | PointerTable]:
        if not self.has_tables:
            return saved[: len(self.tables)]
        self._check()
        waiting = iter(saved)
        return [next(waiting) if table is None else table for table in self.tables]

    def in_place(self, saved: Sequence[Tensor]) -> tuple[Sequence[Tensor | PointerTable], Sequence[Tensor]]:
        """Operands for a kernel, and the shared operands."""
        operands = self._merged(saved)
        if self.has_tables:
            operands = [
                torch.stack(one.tensors) if isinstance(one, PointerTable) and not one.holds() else one
                for one in operands
            ]
        return operands, saved[len(saved) - self.num_shared :]

    def stacked(self, saved: Sequence[Tensor]) -> list[Tensor]:
        """Every operand as one tensor, then the shared operands."""
        operands = [
            torch.stack(operand.tensors) if isinstance(operand, PointerTable) else operand
            for operand in self._merged(saved)
        ]
        return [*operands, *saved[len(saved) - self.num_shared :]]

    def spread(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradients of all inputs, from those of operands and shared operands."""
        if not self.has_tables:
            return gradients
        spread: list[Tensor | None] = []
        for index, gradient in enumerate(gradients):
            table = self.tables[index] if index < len(self.tables) else None
            if table is None:
                spread.append(gradient)
            else:
                spread += [None] * len(table.tensors) if gradient is None else gradient.unbind(0)
        return spread


def tapped(layout: StateLayout, trajectory: Tensor, taps: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    """The states at `taps`, copied: a view would keep the trajectory alive, and pass writes to it on to the backward.

    Args:
        trajectory: as native code made it.
    """
    if layout.is_flat:
        return tuple([copied_block(trajectory, block) for _, block in taps])
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
