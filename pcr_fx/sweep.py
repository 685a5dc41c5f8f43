"""All that leaves a chain, written by native code in the sweep that computes it, with its cotangents read in the sweep back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pcr_fx.body import Interface, Joined, wanted_among
from pcr_fx.body.isolation import is_watched_by_a_mode
from pcr_fx.chain import Leaving, Place, TensorSpec
from pcr_fx.derivatives import unseen_by_dynamo
from pcr_fx.operands import Operand, in_place, look
from pcr_fx.record import SolveRecord
from pcr_fx.straight import (
    Back,
    SavedInputs,
    cotangents_of,
    is_plain_backward,
    tapped,
    tensors_of,
)
from pcr_fx.targets import PointerTable
from pcr_fx.targets.cpp.memory import empty
from pcr_fx.targets.cpp.results import NOWHERE, Strides, in_order, result_strides
from pcr_fx.ways import IN_SEQUENCE, Native, evaluate


@dataclass(frozen=True)
class Taken:
    """A state or an output, and what is taken of it.

    Attributes:
        number: which, outputs counted behind states.
        length: L.
        part: what it is of one block.
        batch_dims: which of its dimensions tell samples apart.
        place: where all its parts stand in what is returned of it; `None` where that is `[L, ...]`.
        is_whole: whether it is returned of all blocks.
        taps: the blocks that it is returned of beside.
    """

    number: int
    length: int
    part: TensorSpec
    batch_dims: tuple[int, ...]
    place: Place | None
    is_whole: bool
    taps: tuple[int, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """That of what is returned whole."""
        shape = self.part.shape
        return (self.length, *shape) if self.place is None else self.place.shape(self.length, shape)

    def parts(self, whole: Tensor) -> Tensor:
        """The parts of all blocks, `[L, ...]`, in what is returned."""
        return whole if self.place is None else self.place.blocks_of(whole, self.length)

    @cached_property
    def where(self) -> tuple[int, Strides | None]:
        """Where in that the first part begins, in bytes, and how parts lie there, if native code can write so."""
        parts = self.parts(torch.empty(self.shape, dtype=self.part.dtype, device="meta"))
        return int(parts.storage_offset()) * parts.element_size(), result_strides(parts, self.batch_dims)

    def cotangents(self, whole: Tensor | None, taps: Sequence[Tensor | None]) -> Tensor | Mapping[int, Tensor] | None:
        """Those of all blocks' parts, `[L, ...]`, or of a few by block.

        Args:
            whole, taps: those of what was returned.
        """
        few = {block: part for block, part in zip(self.taps, taps, strict=True) if part is not None}
        if whole is None:
            return few or None
        if not few:
            return whole
        blocks = torch.tensor(list(few), device=whole.device)
        return whole.index_add(0, blocks, torch.stack(list(few.values())))


@dataclass(frozen=True, eq=False)
class Sweep:
    """How calls of some tensors go through a chain.

    Attributes:
        interface: what the kernel is given and gives.
        joined: which operands are the head's; `None` where there is no head.
        way, way_back: native code of blocks that return their outputs.
        leaving: what is taken of the trajectory.
        taken: what is written beside it.
        order: for each of what leaves where it is in what `KernelSweep` returns.
    """

    interface: Interface
    joined: Joined | None
    way: Native
    way_back: Native
    leaving: Leaving
    taken: tuple[Taken, ...]
    order: tuple[int, ...]

    @cached_property
    def wholes(self) -> tuple[Taken, ...]:
        return tuple(one for one in self.taken if one.is_whole)

    def go(self, initial: Tensor, operands: Sequence[Any], shared: Sequence[Tensor], keeps: bool) -> tuple[Any, ...]:
        """The trajectory, where it `keeps` that or all of it is taken, and what is taken, in the order of `parted`."""
        call, kernel = self.interface.call_with(initial, operands, shared), self.way.kernel
        results = [NOWHERE for _ in kernel.lowered.results]
        wholes, elsewhere = [], []
        for one in self.taken:
            whole = empty(initial, one.shape, one.part.dtype)
            offset, strides = one.where
            if strides is None:
                parts = one.parts(whole)
                written = in_order(parts, one.batch_dims)
                elsewhere.append((parts, written))
                offset, strides = 0, result_strides(written, one.batch_dims)
                assert strides is not None, "what lies in order can be told"
                results[one.number] = written.data_ptr(), *strides, 0
            else:
                results[one.number] = whole.data_ptr() + offset, *strides, 0
            wholes.append(whole)
        keeps, blocks, taps = keeps or bool(self.leaving.whole), self.leaving.blocks, self.leaving.taps
        trajectory = kernel.sweep(call, results, self.way.threads, keeps, blocks)
        if not keeps:
            taps = tuple((index, blocks.index(block)) for index, block in taps)
        for parts, written in elsewhere:
            parts.copy_(written)
        pairs = list(zip(self.taken, wholes, strict=True))
        return trajectory, (
            *((trajectory,) if self.leaving.whole else ()),
            *(whole for one, whole in pairs if one.is_whole),
            *(() if trajectory is None else tapped(self.interface.layout, trajectory, taps)),
            *(one.parts(whole)[block].clone() for one, whole in pairs for block in one.taps),
        )

    def parted(self, flat: Sequence[Any]) -> tuple[Any, list[Any], list[Any], list[list[Any]]]:
        """What `go` took, or its cotangents: of the trajectory, of `wholes`, of taps of states, of taps of each `taken`."""
        waiting = iter(flat)
        trajectory = next(waiting) if self.leaving.whole else None
        wholes = [next(waiting) for _ in self.wholes]
        states = [next(waiting) for _ in self.leaving.taps]
        return trajectory, wholes, states, [[next(waiting) for _ in one.taps] for one in self.taken]

    def cotangents(self, flat: Sequence[Tensor | None]) -> Iterator[Tensor | Mapping[int, Tensor] | None]:
        """Those of each of `taken`."""
        _, wholes, _, taps = self.parted(flat)
        waiting = iter(wholes)
        for one, few in zip(self.taken, taps, strict=True):
            whole = next(waiting) if one.is_whole else None
            yield one.cotangents(None if whole is None else one.parts(whole), few)

    def arranged(self, flat: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What leaves the chain, in its order."""
        every = list(flat)
        if self.leaving.whole:
            trajectories = self.interface.layout.unflatten(flat[0], leading=1)
            every = [*(trajectories[index] for index in self.leaving.whole), *flat[1:]]
        return tuple([every[position] for position in self.order])

    def run(
        self,
        record: SolveRecord,
        back: Back,
        states: Sequence[Tensor],
        own: tuple[Sequence[Tensor | PointerTable], Sequence[Tensor]],
        head: tuple[Sequence[Operand], Sequence[Tensor]],
    ) -> tuple[Tensor, ...]:
        """What leaves the chain.

        Args:
            own, head: per-block operands and shared operands of the chain, the former as kernels take them, and of its head.
        """
        operands, shared = own
        if self.joined is not None:
            more = self.joined.operands_of((), head[0])
            operands = [*operands, *(in_place(operand, look(operand)) for operand in more)]
            shared = self.joined.shared_of(shared, head[1])
        initial = self.interface.layout.flatten(states)
        record.forward(self.way.solver, IN_SEQUENCE)
        if torch.is_grad_enabled():
            parts = tensors_of(operands)
            if any(tensor.requires_grad for tensor in (initial, *parts, *shared)):
                flat = KernelSweep.apply(self, back, record, operands, shared, initial, *parts, *shared)
                return self.arranged(flat)
        return self.arranged(self.go(initial, operands, shared, keeps=False)[1])


class KernelSweep(torch.autograd.Function):
    """As `KernelSolve`, of what a sweep takes."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        sweep: Sweep,
        back: Back,
        record: SolveRecord,
        operands: Sequence[Tensor | PointerTable],
        shared: Sequence[Tensor],
        initial: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """`tensors`: the operands, tables as their tensors, then the shared operands."""
        ctx.sweep, ctx.back, ctx.record = sweep, back, record
        ctx.set_materialize_grads(False)
        keeps = any(ctx.needs_input_grad)
        trajectory, taken = sweep.go(initial, operands, shared, keeps)
        if keeps:
            ctx.inputs = SavedInputs(operands, len(shared))
            ctx.save_for_backward(initial, trajectory, *(t for t in operands if isinstance(t, Tensor)), *shared)
        ctx.mark_non_differentiable(*(one for one in taken if not one.is_floating_point()))
        return taken

    @staticmethod
    @unseen_by_dynamo
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Any, ...]:
        if all(part is None for part in given):
            return (None,) * len(ctx.needs_input_grad)
        initial, trajectory, *saved = ctx.saved_tensors
        sweep, back = ctx.sweep, ctx.back
        interface = sweep.interface
        wanted = wanted_among(interface.differentiable, ctx.inputs.asked(ctx.needs_input_grad[6:]))
        rest: Sequence[Tensor | None]
        if is_plain_backward(given) and back.way.is_ready("backward", initial, wanted):
            dense, _, states, _ = sweep.parted(given)
            of_states = [dense, *states] if sweep.leaving.whole else states
            among = cotangents_of(interface.layout, initial, sweep.leaving, of_states)
            results: list[Any] = [None for _ in back.way.kernel.lowered.results]
            for one, cotangents in zip(sweep.taken, sweep.cotangents(given), strict=True):
                results[one.number] = cotangents
            operands, shared = ctx.inputs.in_place(saved)
            call = interface.call_with(initial, operands, shared)
            d_initial, rest = back.pull(ctx.record, call, wanted, trajectory, among, results)
        else:
            # Second derivatives have no kernel: later calls are left to the model's own ops.
            ctx.record.is_differentiated_twice |= torch.is_grad_enabled()
            d_initial, *rest = _unrolled(sweep, initial, ctx.inputs.stacked(saved), given, wanted)
        waiting = iter(rest)
        needs = interface.wanting(wanted).differentiable
        gradients = [next(waiting) if need else None for need in needs]
        return None, None, None, None, None, d_initial, *ctx.inputs.spread(gradients)


def _unrolled(
    sweep: Sweep,
    initial: Tensor,
    tensors: Sequence[Tensor],
    given: Sequence[Tensor | None],
    wanted: tuple[bool, ...] | None,
) -> Sequence[Tensor | None]:
    """The gradients of the initial state and of what is differentiable and wanted, in the model's own ops: many at a time, or
    differentiable in turn.
    """
    interface, count = sweep.interface, sweep.interface.chain.num_operands
    needs = [True, *interface.wanting(wanted).differentiable]
    twice, watched = torch.is_grad_enabled(), is_watched_by_a_mode()
    with torch.enable_grad():
        every = [
            tensor if not need or (twice and tensor.requires_grad) else tensor.detach().requires_grad_()
            for tensor, need in zip([initial, *tensors], needs, strict=True)
        ]
        if watched and not initial.requires_grad:
            every[0] = initial.detach()
        layout = interface.layout
        # A mode sees the ops of this backward, and none of the forward that was.
        with _disable_current_modes() if watched else contextlib.nullcontext():
            found = evaluate(interface.chain, layout.unflatten(every[0]), every[1 : 1 + count], every[1 + count :])
            values = [value(found) for value in _values(sweep)]
        pairs = [
            (value, cotangent)
            for value, cotangent in zip(values, _by_blocks(sweep, given), strict=True)
            if cotangent is not None and value.requires_grad
        ]
        leaves = [tensor for tensor, need in zip(every, needs, strict=True) if need]
        if not pairs:
            return [None for _ in leaves]
        reached, cotangents = zip(*pairs, strict=True)
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = iter(torch.autograd.grad(reached, asked, cotangents, allow_unused=True, create_graph=twice))
    return [next(gradients) if leaf.requires_grad else None for leaf in leaves]


Found = Mapping[int, tuple[Tensor, ...]]


def _values(sweep: Sweep) -> Iterator[Callable[[Found], Tensor]]:
    """How each of what a sweep takes comes of the states and outputs of all blocks; what is whole as `[L, ...]`."""
    layout, count = sweep.interface.layout, sweep.interface.chain.num_states
    if sweep.leaving.whole:
        yield lambda found: torch.stack([layout.flatten(values[:count]) for values in found.values()])
    for whole in sweep.wholes:
        yield lambda found, number=whole.number: torch.stack([values[number] for values in found.values()])  # type: ignore[misc]
    for tap in (*sweep.leaving.taps, *((one.number, block) for one in sweep.taken for block in one.taps)):
        yield lambda found, tap=tap: found[tap[1]][tap[0]]  # type: ignore[misc]


def _by_blocks(sweep: Sweep, given: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
    """The cotangents of these."""
    trajectory, wholes, states, taps = sweep.parted(given)
    if sweep.leaving.whole:
        yield trajectory
    for one, whole in zip(sweep.wholes, wholes, strict=True):
        yield None if whole is None else one.parts(whole)
    yield from states
    for each in taps:
        yield from each
