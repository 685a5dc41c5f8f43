"""Which sweep gives all that leaves a chain, for tensors of some shapes: a kernel of the chain and its head as one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor

from pcr_fx.body import Interface, Joined, Signature, join
from pcr_fx.chain import Chain, Leaving, TensorSpec
from pcr_fx.errors import BodyError, UnsupportedError
from pcr_fx.looks import plain_look, signature_of
from pcr_fx.manners import Manner
from pcr_fx.operands import Operand, look
from pcr_fx.planner import Plan
from pcr_fx.sweep import Sweep, Taken
from pcr_fx.targets import CppKernel
from pcr_fx.ways import Native

log = logging.getLogger(__name__)

# Shapes and dtypes that a sweep is kept for.
_SWEEPS = 256

# By the tensors that they are for: a chain and its head as one, and its kernel; or why there is none.
Joints: TypeAlias = dict[Any, "tuple[Joined, CppKernel] | Exception"]


class Sweeps:
    """Those of one solve node.

    Args:
        chain, leaving: of the node.
        name: of the chain, for what is logged.
        joints: what is known of chains of the same blocks, which may be more or fewer.

    Attributes:
        are_wanted: whether anything leaves the chain but states by themselves, or trajectories that stay what they are.
    """

    def __init__(self, chain: Chain, leaving: Leaving, name: str, joints: Joints | None = None) -> None:
        self.chain, self.leaving, self.name = chain, leaving, name
        self.joints: Joints = {} if joints is None else joints
        self.are_wanted = chain.head is not None or any(leaving.places)
        self._found: dict[Any, Sweep | Manner] = {}

    def of(
        self,
        key: Any,
        plan: Plan,
        ways: tuple[Native, Native],
        states: Sequence[Tensor],
        operands: Sequence[Operand],
        shared: Sequence[Tensor],
        judge: Callable[[Sweep | None], Manner],
    ) -> Sweep | Manner:
        """How a call in place goes: by a sweep, or what else its outputs are computed by.

        Args:
            key: what decides of the chain's own tensors.
            ways: forward and back, of the chain without its head.
            operands, shared: those of the head.
            judge: asked once for such tensors whether the sweep, if there is one, is what takes the least time.
        """
        seen = plain_look((), [look(operand) for operand in operands], shared) if operands or shared else ()
        known = key, ways, seen
        if known not in self._found:
            sweep = None if seen is None else self._find(plan, ways, states, operands, shared)
            manner = judge(sweep)
            self._found[known] = sweep if sweep is not None and manner is Manner.SWEPT else manner
            if len(self._found) > _SWEEPS:
                self._found.pop(next(iter(list(self._found))), None)  # other threads may be at it, too
        return self._found[known]

    def latest(self) -> Sweep | None:
        """The one that was found last, if a sweep it was."""
        found = next(reversed(list(self._found.values())), None)
        return found if isinstance(found, Sweep) else None

    def _find(
        self,
        plan: Plan,
        ways: tuple[Native, Native],
        states: Sequence[Tensor],
        operands: Sequence[Operand],
        shared: Sequence[Tensor],
    ) -> Sweep | None:
        head = signature_of((), operands, shared)
        try:
            sweep = find_sweep(self.chain, self.leaving, plan, ways, states, (head.operands, head.shared), self.joints)
        except (BodyError, UnsupportedError) as reason:
            log.info("the outputs of %s are computed behind its blocks: %s", self.name, reason)
            return None
        return sweep if sweep.way.is_ready("forward", plan.program.layout.flatten(states)) else None


def find_sweep(
    chain: Chain,
    leaving: Leaving,
    plan: Plan,
    ways: tuple[Native, Native],
    states: Sequence[Tensor],
    head: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]],
    joints: Joints,
) -> Sweep:
    """How calls of such tensors go.

    Args:
        ways: forward and back, of the chain without its head.
        head: per-block operands of the head, without their leading L, and its shared operands.
        joints: what was found of chains of the same blocks.

    Raises:
        BodyError, UnsupportedError: no kernel computes the outputs; the message is the reason.
    """
    interface: Interface = plan.program
    joined = None
    if chain.head is not None:
        key = plan.program.signature, *head
        if key not in joints:
            try:
                joints[key] = _joint(chain, plan, ways[0].kernel, head)
            except (BodyError, UnsupportedError) as reason:
                joints[key] = reason
        found = joints[key]
        if isinstance(found, Exception):
            raise found
        joined, kernel = found
        interface = replace(kernel.program, chain=kernel.program.chain.of_length(chain.length))
        ways = replace(ways[0], kernel=kernel), replace(ways[1], kernel=kernel)
    return _sweep(interface, joined, ways, leaving, states)


def _joint(
    chain: Chain, plan: Plan, alone: CppKernel, head: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]
) -> tuple[Joined, CppKernel]:
    """A chain and its head as one, and the kernel of that."""
    joined, signature = join(chain), plan.program.signature
    operands = joined.operands_of(signature.operands, head[0])
    shared = joined.shared_of(signature.shared, head[1])
    every = Signature(signature.states, tuple(operands), tuple(shared))
    kernel = CppKernel.of(Interface.of(joined.chain, every, plan.program.layout))
    if kernel.body.batch_dims != alone.body.batch_dims:
        raise BodyError("an output is not each sample's own")
    return joined, kernel


def _sweep(
    interface: Interface, joined: Joined | None, ways: tuple[Native, Native], leaving: Leaving, states: Sequence[Tensor]
) -> Sweep:
    kernel, count = ways[0].kernel, len(states)
    parts = [*map(TensorSpec.of, states), *(output.spec for output in kernel.body.outputs)]
    places = leaving.places or tuple(None for _ in leaving.whole)
    whole = dict(zip(leaving.whole, places, strict=True))
    of_trajectory = tuple(index for index, place in whole.items() if index < count and place is None)
    taps = tuple(tap for tap in leaving.taps if tap[0] < count)
    taken = []
    for number in range(len(parts)):
        blocks = tuple(block for index, block in leaving.taps if index == number and number >= count)
        is_whole = number in whole and number not in of_trajectory
        if is_whole or blocks:
            dims = kernel.batch_dims_of(number)
            taken.append(Taken(number, interface.length, parts[number], dims, whole.get(number), is_whole, blocks))
    # As `go` returns them.
    flat: list[Any] = [*of_trajectory, *(one.number for one in taken if one.is_whole)]
    flat += [*taps, *((one.number, block) for one in taken for block in one.taps)]
    positions = {one: position for position, one in enumerate(flat)}
    order = tuple(positions[one] for one in (*leaving.whole, *leaving.taps))
    return Sweep(interface, joined, *ways, Leaving(taps, of_trajectory), tuple(taken), order)
