"""Where the calls of a solve node go: found out once for tensors of some shapes, dtypes and classes."""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pcr_fx.body import Signature
from pcr_fx.body.isolation import is_plain_call, is_undisturbed
from pcr_fx.chain import Chain
from pcr_fx.errors import BodyError
from pcr_fx.looks import (
    SOLVED_DTYPES,
    autocast_dtype,
    dtypes_of,
    every_tensor,
    raised,
    refuse_mixed,
    refuse_unusual,
    signature_of,
)
from pcr_fx.operands import Operand, first_part, is_ordinary, is_plain, parts_of, stacked
from pcr_fx.options import Options
from pcr_fx.planner import Choice, Plan, Watch, make_plan
from pcr_fx.ways import Native

log = logging.getLogger(__name__)


# Shapes and dtypes that a node keeps a route for; a model that meets ever new ones plans those anew that it met first.
ROUTES = 256


class Where(enum.Enum):
    """Where a call goes."""

    IN_PLACE = "straight to native code, which reads the blocks' tensors where they lie"
    EAGER = "the blocks as the model wrote them, because nothing is faster"
    OPERATORS = "the operators, which compilers and transforms see"
    UNSOLVABLE = "the blocks as the model wrote them, because they cannot be solved as a chain"


@dataclass(frozen=True)
class Route:
    """Where calls with such tensors go.

    Attributes:
        signature: what the plan is for; `None` where the plan was made beforehand.
        way, way_back: what runs calls in place, and their backwards.
        watch, watch_back: what times some of them.
        dtypes: of the states that the model itself would return, for calls of operators.
    """

    signature: Signature | None
    plan: Plan | BodyError
    where: Where
    way: Native | None = None
    way_back: Native | None = None
    watch: Watch | None = None
    watch_back: Watch | None = None
    dtypes: tuple[torch.dtype, ...] = ()

    @property
    def is_final(self) -> bool:
        """Whether later calls need not ask again; what operators run may yet turn out to be slower than the model."""
        return self.where is not Where.OPERATORS


class Routes:
    """Those of one node, of the latest tensors that it met.

    Args:
        chain, options, plan: of the node.
        name: how the log calls the chain.
        make: makes a plan.
        told: why chains like it run block by block, as far as that was logged.

    Attributes:
        choice: the latest.
    """

    def __init__(
        self,
        chain: Chain,
        options: Options,
        plan: Plan | None,
        name: str,
        make: Callable[[Chain, Signature, Options], Plan] = make_plan,
        told: set[str] | None = None,
    ) -> None:
        self.chain, self.options, self.plan, self.name, self._make = chain, options, plan, name, make
        self._told = told
        self.choice: Choice | None = None
        self.known: dict[Any, Route] = {}

    def look(self, states: Sequence[Tensor], operands: Sequence[Operand], shared: Sequence[Tensor]) -> Any:
        """All that decides where a call goes that something looks on at."""
        autocast = autocast_dtype(states[0].device.type)
        # A plan made beforehand is for symbolic sizes too, which may not be asked for.
        signature = None if self.plan is not None else signature_of(states, operands, shared)
        kinds = tuple(type(one) for one in every_tensor(states, operands, shared) if not is_ordinary(one))
        return signature, torch.is_grad_enabled(), autocast, kinds, *dtypes_of(states, operands, shared)

    def find(
        self,
        key: Any,
        known: Route | None,
        is_plain: bool,
        states: Sequence[Tensor],
        operands: Sequence[Operand],
        shared: Sequence[Tensor],
    ) -> Route:
        """Find out where calls with such tensors go.

        A call that took another way than the one before would save other tensors, which checkpoints compare: in one, the
        route of a plain call stays what it is.
        """
        if known is not None and is_plain and not is_undisturbed():
            return known
        signature, plan = (known.signature, known.plan) if known else self._planned(states, operands, shared)
        if isinstance(plan, BodyError):
            route = Route(signature, plan, Where.UNSOLVABLE)
        else:
            with plan.learnt.lock:
                route = self._route_by(plan, signature, is_plain, states, operands, shared)
        self.known[key] = route
        if len(self.known) > ROUTES:
            self.known.pop(next(iter(list(self.known))), None)  # other threads may be at it, too
        return route

    def _route_by(
        self,
        plan: Plan,
        signature: Signature | None,
        is_plain: bool,
        states: Sequence[Tensor],
        operands: Sequence[Operand],
        shared: Sequence[Tensor],
    ) -> Route:
        # Low precision is solved in float32, by way of copies.
        as_it_is = all(dtype == plan.program.dtype for dtype in dtypes_of(states, operands, shared))
        if self.plan is None:
            choice = self.choice = self._choose(plan, states, operands, shared)
        elif is_plain and as_it_is:
            doubted = plan.wants_another_look(plan.samples_of(states))
            choice = self._choose(plan, states, operands, shared) if doubted else plan.choice(plan.samples_of(states))
        else:
            return Route(signature, plan, Where.OPERATORS, dtypes=self._output_dtypes(states, operands, shared))
        samples = plan.samples_of(states)
        if choice.leaves_alone(torch.is_grad_enabled()):
            return Route(signature, plan, Where.EAGER, watch=plan.watch(samples, "forward", alone=True))
        way, back = choice.forward, choice.backward if isinstance(choice.backward, Native) else None
        reads = is_plain and as_it_is and choice.is_in_place(torch.is_grad_enabled())
        if reads and isinstance(way, Native) and way.is_ready("forward", plan.program.layout.flatten(states)):
            there, here = plan.watch(samples, "forward"), None if back is None else plan.watch(samples, "backward")
            return Route(signature, plan, Where.IN_PLACE, way, back or way, there, here)
        return Route(signature, plan, Where.OPERATORS, dtypes=self._output_dtypes(states, operands, shared))

    def _choose(
        self, plan: Plan, states: Sequence[Tensor], operands: Sequence[Operand], shared: Sequence[Tensor]
    ) -> Choice:
        """What is to run these tensors: measured on them where that is wanted, and where nothing looks on."""
        samples, needs_gradient = plan.samples_of(states), torch.is_grad_enabled()
        if not plan.wants_measuring(samples, needs_gradient) or not _may_measure(states[0]):
            return plan.choice(samples)
        # A checkpoint computes again what it computed, and compares what is saved: no time to change the way.
        if plan.wants_another_look(samples) and not is_undisturbed():
            return plan.choice(samples)
        wanted = [*map(_is_wanted, operands), *(tensor.requires_grad for tensor in shared)]
        with torch.no_grad():
            initial = plan.program.layout.flatten([raised(state) for state in states])
            every = [raised(stacked(operand)) for operand in operands]
            are_stacked = not all(isinstance(operand, Tensor) for operand in operands)
            call = plan.program.call_with(initial, every, [raised(tensor) for tensor in shared])
            # Around a plan made beforehand the model was compiled without the blocks.
            return plan.measure(call, needs_gradient, are_stacked, with_eager=self.plan is None, wanted=wanted)

    def learn(self, plan: Plan) -> None:
        """Take a plan made before the first call."""
        signature = plan.program.signature
        self.known[signature] = Route(signature, plan, Where.OPERATORS)

    def plan_for(
        self, states: Sequence[Tensor], operands: Sequence[Operand], shared: Sequence[Tensor]
    ) -> Plan | BodyError:
        """The plan for such tensors, or the reason why there is none."""
        return self._planned(states, operands, shared)[1]

    def _planned(
        self, states: Sequence[Tensor], operands: Sequence[Operand], shared: Sequence[Tensor]
    ) -> tuple[Signature | None, Plan | BodyError]:
        """What the plan is for, unless it was given; and `plan_for`."""
        signature = None if self.plan is not None else signature_of(states, operands, shared)
        refusal = refuse_unusual(every_tensor(states, operands, shared)) or refuse_mixed(
            dtypes_of(states, operands, shared), states[0].device.type
        )
        if refusal is not None:
            log.warning("%s runs block by block: %s", self.name, refusal)
            return None, refusal  # others of these sizes have a plan
        if self.plan is not None:
            return None, self.plan
        assert signature is not None, "without a plan there is a signature to make one for"
        known = next((route.plan for route in list(self.known.values()) if route.signature == signature), None)
        if known is not None:
            return signature, known
        told = set[str]() if self._told is None else self._told
        try:
            return signature, self._make(self.chain, signature, self.options)
        except BodyError as reason:
            level = logging.DEBUG if str(reason) in told else logging.WARNING
            log.log(level, "%s runs block by block: %s", self.name, reason)
            told.add(str(reason))
            return signature, reason

    @property
    def outcome(self) -> Plan | BodyError | None:
        """The latest plan, or the reason why there is none; `None` before the first call."""
        latest = next(reversed(list(self.known.values())), None)
        return self.plan or (None if latest is None else latest.plan)

    def doubt(self, plan: Plan, samples: int) -> None:
        """Have a plan look again, and calls ask it where they go."""
        if plan.doubt(samples):
            for key in [key for key, known in list(self.known.items()) if known.plan is plan]:
                self.known.pop(key, None)

    def _output_dtypes(
        self, states: Sequence[Tensor], operands: Sequence[Operand], shared: Sequence[Tensor]
    ) -> tuple[torch.dtype, ...]:
        """The dtypes that the model itself would return, which autocast and low precision decide."""
        every = dtypes_of(states, operands, shared)
        solved = (dtype in SOLVED_DTYPES for dtype in every if dtype.is_floating_point)
        if autocast_dtype(states[0].device.type) is None and all(solved):
            return tuple(state.dtype for state in states)
        groups = states, [first_part(operand) for operand in operands], shared
        with FakeTensorMode():
            current, each, common = (
                [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in group]
                for group in groups
            )
            literals = [values[0] for values in self.chain.literals]
            # Twice: the first block may change the dtype that all others then keep.
            for _ in range(min(2, self.chain.length)):
                current = list(self.chain.body.forward(*current, *each, *literals, *common))
        return tuple(state.dtype for state in current)


def _may_measure(initial: Tensor) -> bool:
    """Whether time can be taken here, on this tensor's device."""
    if not is_plain_call() or not is_plain(initial):
        return False
    return initial.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _is_wanted(operand: Operand) -> bool:
    """Whether anybody wants the gradient of a per-block operand, of some blocks at least."""
    return any(part.requires_grad for part in ([operand] if isinstance(operand, Tensor) else parts_of(operand)))
