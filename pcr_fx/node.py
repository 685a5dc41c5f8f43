"""The solve node: the module that stands in a rewritten graph where a chain stood."""

from __future__ import annotations

import copy
import enum
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pcr_fx.body import Signature, StateLayout
from pcr_fx.body.isolation import is_plain_call, is_undisturbed, wants_every_op
from pcr_fx.body.written_out import may_raise
from pcr_fx.call import Call
from pcr_fx.chain import Chain, Leaving
from pcr_fx.derivatives import Back, KernelSolve, Solve, tapped, tensors_of
from pcr_fx.errors import BodyError
from pcr_fx.heads import OutputsBehind
from pcr_fx.looks import (
    SOLVED_DTYPES,
    autocast_dtype,
    dtypes_of,
    every_tensor,
    plain_look,
    raised,
    refuse_mixed,
    refuse_unusual,
    signature_of,
)
from pcr_fx.operands import (
    Operand,
    first_part,
    in_place,
    is_ordinary,
    is_plain,
    look,
    parts_of,
    stacked,
)
from pcr_fx.options import Options
from pcr_fx.planner import Choice, Plan, Watch, make_plan
from pcr_fx.record import SolveRecord
from pcr_fx.sweep import Joints, Sweeps
from pcr_fx.targets import PointerTable
from pcr_fx.ways import IN_SEQUENCE, Native, evaluate_whole

log = logging.getLogger(__name__)


# Shapes and dtypes that a node keeps a route for; a model that meets ever new ones plans those anew that it met first.
_ROUTES = 256


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


@dataclass(eq=False)
class Family:
    """What the solve nodes of chains of the same blocks, but more or fewer of them, have in common.

    Attributes:
        plan: makes their plans.
        joints: of their sweeps.
        told: why they run block by block, as far as that was logged.
    """

    plan: Callable[[Chain, Signature, Options], Plan]
    joints: Joints = field(default_factory=dict)
    told: set[str] = field(default_factory=set)


class SolveNode(nn.Module):
    """Evaluates a chain: `(states, operands, shared) -> trajectories`.

    Args:
        chain: what to evaluate.
        options: how.
        plan: made beforehand, when the shapes of every call are known to match it (a compiler's guards see to that).
            Without one the node plans at the first call of each signature.
        leaving: what to return, each tap a copy; without it the trajectories of all states.
        family: what it shares with the nodes of other lengths; `None` where there are none.
    """

    def __init__(
        self,
        chain: Chain,
        options: Options,
        plan: Plan | None = None,
        leaving: Leaving | None = None,
        family: Family | None = None,
    ) -> None:
        super().__init__()
        self.family, self._joints = family, None if family is None else family.joints
        self.chain = chain
        self.is_in_graph = leaving is not None
        self.options = options
        self.plan = plan
        # Where a block may have an error to raise, its states are looked at before anybody gets them.
        self._may_raise = may_raise(chain.body)
        self.record = SolveRecord(chain.origin.modules or "a chain")
        self.choice: Choice | None = None
        self._routes: dict[Any, Route] = {}
        self._outputs = None if chain.head is None else OutputsBehind(chain.head, chain.length, self.record.name)
        self.takes(leaving or Leaving((), tuple(range(chain.num_states))))

    def takes(self, leaving: Leaving) -> None:
        """Have calls return this."""
        self.leaving, self.of_solve = leaving, leaving.of_solve(self.chain)
        self.has_places = any(place is not None for place in leaving.places)
        self._sweeps = Sweeps(self.chain, leaving, self.record.name, self._joints)

    def __deepcopy__(self, memo: dict[int, Any]) -> SolveNode:
        # Plans are immutable and shared; what happened at a node is its own.
        leaving = self.leaving if self.is_in_graph else None
        node = SolveNode(self.chain, self.options, self.plan, leaving, self.family)
        node._routes = copy.copy(self._routes)
        node.training = self.training
        memo[id(self)] = node
        return node

    def with_own_record(self) -> SolveNode:
        """The node with all that it has found out, and a record of what happens from here on."""
        node = copy.copy(self)
        node.record = SolveRecord(self.record.name)
        return node

    def forward(
        self,
        states: Sequence[Tensor],
        operands: Sequence[Operand],
        shared: Sequence[Tensor],
        head_operands: Sequence[Operand] = (),
        head_shared: Sequence[Tensor] = (),
    ) -> tuple[Any, ...]:
        """What leaves the chain.

        Args:
            states: the initial states.
            operands: per-block operands, `[L, ...]`, or what can stack them or tell where they lie.
            shared: shared operands.
            head_operands, head_shared: those of its head.

        Returns:
            Trajectories and outputs `[L, ...]`, then taps. Left to the model's own ops in a graph, the former are lists.
        """
        if torch.autograd._profiler_enabled():
            with torch.autograd.profiler.record_function(f"pcr_fx: {self.record.name}"):
                return self._run(states, operands, shared, head_operands, head_shared)
        return self._run(states, operands, shared, head_operands, head_shared)

    def _run(
        self,
        states: Sequence[Tensor],
        operands: Sequence[Operand],
        shared: Sequence[Tensor],
        head_operands: Sequence[Operand],
        head_shared: Sequence[Tensor],
    ) -> tuple[Any, ...]:
        """What leaves the chain, by the route of such tensors."""
        is_plain = is_plain_call()
        whole = [(operands, shared), (head_operands, head_shared)]
        if not is_plain and wants_every_op():
            return self._block_by_block(states, whole)
        seen = [look(operand) for operand in operands] if is_plain else []
        key = plain_look(states, seen, shared) if is_plain else None
        is_plain = key is not None
        if key is None:
            key = self._look(states, operands, shared)
        route = self._routes.get(key)
        if route is None or not route.is_final:
            route = self._route(key, route, is_plain, states, operands, shared)
        if is_plain and self.record.is_differentiated_twice and torch.is_grad_enabled() and is_undisturbed():
            return self._block_by_block(states, whole)
        if route.where in (Where.EAGER, Where.UNSOLVABLE):
            left_alone = route.where is Where.EAGER
            return self._timed(route, states, partial(self._block_by_block, states, whole, left_alone))
        if route.where is Where.IN_PLACE:
            given = [in_place(operand, table) for operand, table in zip(operands, seen, strict=True)]
            if self._sweeps.are_wanted and not self._may_raise:
                assert isinstance(route.plan, Plan) and route.way is not None
                ways = route.way, route.way_back or route.way
                sweep = self._sweeps.of(key, route.plan, ways, states, head_operands, head_shared)
                if sweep is not None:
                    back = Back(sweep.way_back, route.watch_back, partial(self._doubt, route, states))
                    every = states, (given, shared), (head_operands, head_shared)
                    return self._timed(route, states, partial(sweep.run, self.record, back, *every))
            solved = self._timed(route, states, partial(self._in_place, route, states, given, shared))
        else:
            solved = self._by_operators(route, states, operands, shared)
        if self._may_raise and is_plain and not all(bool(part.isfinite().all()) for part in solved):
            return self._block_by_block(states, whole)  # there is an error to raise, if it is one
        if self._outputs is not None:
            solved = self._with_outputs(self._outputs, states, solved, head_operands, head_shared)
        return self.placed(solved) if self.has_places else solved

    def as_written(
        self,
        states: Sequence[Tensor],
        operands: Sequence[Operand],
        shared: Sequence[Tensor],
        head_operands: Sequence[Operand] = (),
        head_shared: Sequence[Tensor] = (),
    ) -> tuple[Any, ...]:
        """`forward` by the blocks as the model wrote them."""
        return self._block_by_block(states, [(operands, shared), (head_operands, head_shared)])

    def placed(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What leaves the chain, `[L, ...]` where it is whole, in the places that it is to have."""
        places = [*self.leaving.places, *(None for _ in leaves[len(self.leaving.places) :])]
        return tuple([one if place is None else place.filled(one) for one, place in zip(leaves, places, strict=True)])

    def _timed(self, route: Route, states: Sequence[Tensor], run: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """What `run` returns, which is watched now and then."""
        watch = route.watch
        began = perf_counter() if watch is not None and watch.begins() else None
        found = run()
        if began is not None and watch.ended(perf_counter() - began):  # type: ignore[union-attr]
            self._doubt(route, states)
        return found

    def _doubt(self, route: Route, states: Sequence[Tensor]) -> None:
        """Have the plan look again, and calls ask it where they go."""
        plan = route.plan
        if isinstance(plan, Plan) and plan.doubt(plan.samples_of(states)):
            for key in [key for key, known in list(self._routes.items()) if known.plan is plan]:
                self._routes.pop(key, None)

    def _with_outputs(
        self,
        behind: OutputsBehind,
        states: Sequence[Tensor],
        solved: Sequence[Tensor],
        operands: Sequence[Operand],
        shared: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """What leaves the chain, of what the solve returned: all trajectories, and those taps that are states."""
        count = self.chain.num_states
        trajectories, states_taken = list(solved[:count]), iter(solved[count:])
        values = [*trajectories, *behind.of(states, trajectories, list(map(stacked, operands)), shared)]
        taps = [
            next(states_taken) if index < count else values[index][block].clone() for index, block in self.leaving.taps
        ]
        return (*(values[index] for index in self.leaving.whole), *taps)

    def _look(self, states: Sequence[Tensor], operands: Sequence[Operand], shared: Sequence[Tensor]) -> Any:
        """All that decides where a call goes that something looks on at."""
        autocast = autocast_dtype(states[0].device.type)
        # A plan made beforehand is for symbolic sizes too, which may not be asked for.
        signature = None if self.plan is not None else signature_of(states, operands, shared)
        kinds = tuple(type(one) for one in every_tensor(states, operands, shared) if not is_ordinary(one))
        return signature, torch.is_grad_enabled(), autocast, kinds, *dtypes_of(states, operands, shared)

    def _route(
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
        self._routes[key] = route
        if len(self._routes) > _ROUTES:
            self._routes.pop(next(iter(list(self._routes))), None)  # other threads may be at it, too
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

    def _in_place(
        self, route: Route, states: Sequence[Tensor], given: Sequence[Tensor | PointerTable], shared: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Straight to native code: most of what an operator costs is asking who else wants to know."""
        plan, way = route.plan, route.way
        assert isinstance(plan, Plan) and way is not None
        layout = plan.program.layout
        initial = layout.flatten(states)
        self.record.forward(way.solver, IN_SEQUENCE)
        leaving = self.of_solve
        if torch.is_grad_enabled():
            parts = tensors_of(given)
            if any(tensor.requires_grad for tensor in (initial, *parts, *shared)):
                back = Back(route.way_back or way, route.watch_back, partial(self._doubt, route, states))
                every = (self.record, leaving, given, shared, initial, *parts, *shared)
                solved: tuple[Tensor, ...] = KernelSolve.apply(plan, way, back, *every)
                return self._apart(layout, solved[0], solved[1:]) if leaving.whole else solved
        call = plan.program.call_with(initial, given, shared)
        if not leaving.whole:
            return _states_at(leaving, layout, way, call)
        trajectory = way.kernel.solve(call, way.threads)
        return self._apart(layout, trajectory, tapped(layout, trajectory, leaving.taps))

    def _apart(self, layout: StateLayout, trajectory: Tensor, taken: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The trajectories that leave the solve, then the taps."""
        trajectories = layout.unflatten(trajectory, leading=1)
        return (*(trajectories[index] for index in self.of_solve.whole), *taken)

    def _by_operators(
        self, route: Route, states: Sequence[Tensor], operands: Sequence[Operand], shared: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        plan = route.plan
        assert isinstance(plan, Plan)
        layout = plan.program.layout
        initial = layout.flatten([raised(state) for state in states])
        self.record.prepare(plan, initial.device)
        tensors = [raised(tensor) for tensor in (*map(stacked, operands), *shared)]
        trajectory: Tensor = Solve.apply(initial, plan.key, self.record.id, len(operands), *tensors)
        whole = layout.unflatten(trajectory, leading=1)
        trajectories = [part.to(dtype) for part, dtype in zip(whole, route.dtypes, strict=True)]
        taken = [trajectories[index][block].clone() for index, block in self.of_solve.taps]
        return (*(trajectories[index] for index in self.of_solve.whole), *taken)

    def _block_by_block(
        self,
        states: Sequence[Tensor],
        given: Sequence[tuple[Sequence[Operand], Sequence[Tensor]]],
        left_alone: bool = False,
    ) -> tuple[Any, ...]:
        """The blocks as the model wrote them, under plain autograd.

        Args:
            left_alone: whether that is because nothing is faster.
        """
        if self.chain.own_op is not None:
            self._note_own(left_alone)
            leaves: tuple[Any, ...] = self.chain.own_op(states, list(map(stacked, given[0][0])), given[0][1])
            return leaves
        wanted = None if self.leaving.whole else {block for _, block in self.leaving.taps}
        parts = [([parts_of(operand) for operand in operands], shared) for operands, shared in given]
        found = evaluate_whole(self.chain, states, parts, wanted)
        self._note_own(left_alone)
        # What the model's own ops made is nobody else's: no copies.
        whole = [[values[index] for values in found.values()] for index in self.leaving.whole]
        if not self.is_in_graph:
            return tuple(torch.stack(values) for values in whole)
        return (*whole, *(found[block][index] for index, block in self.leaving.taps))

    def _note_own(self, left_alone: bool) -> None:
        self.record.forward("sequential", IN_SEQUENCE)
        self.record.solver_backward = "sequential"
        self.record.left_alone = left_alone

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
        with torch.no_grad():
            initial = plan.program.layout.flatten([raised(state) for state in states])
            every = [raised(stacked(operand)) for operand in operands]
            are_stacked = not all(isinstance(operand, Tensor) for operand in operands)
            call = plan.program.call_with(initial, every, [raised(tensor) for tensor in shared])
            # Around a plan made beforehand the model was compiled without the blocks.
            return plan.measure(call, needs_gradient, are_stacked, with_eager=self.plan is None)

    def learn(self, plan: Plan) -> None:
        """Take a plan made before the first call."""
        signature = plan.program.signature
        self._routes[signature] = Route(signature, plan, Where.OPERATORS)

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
            log.warning("%s runs block by block: %s", self.record.name, refusal)
            return None, refusal  # others of these sizes have a plan
        if self.plan is not None:
            return None, self.plan
        assert signature is not None, "without a plan there is a signature to make one for"
        known = next((route.plan for route in list(self._routes.values()) if route.signature == signature), None)
        if known is not None:
            return signature, known
        plan, told = (make_plan, set[str]()) if self.family is None else (self.family.plan, self.family.told)
        try:
            return signature, plan(self.chain, signature, self.options)
        except BodyError as reason:
            level = logging.DEBUG if str(reason) in told else logging.WARNING
            log.log(level, "%s runs block by block: %s", self.record.name, reason)
            told.add(str(reason))
            return signature, reason

    @property
    def outcome(self) -> Plan | BodyError | None:
        """The latest plan, or the reason why there is none; `None` before the first call."""
        latest = next(reversed(list(self._routes.values())), None)
        return self.plan or (None if latest is None else latest.plan)

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


def _states_at(leaving: Leaving, layout: StateLayout, way: Native, call: Call) -> tuple[Tensor, ...]:
    """The taps, where nothing looks at the other states: no memory is taken for them."""
    kept = way.kernel.solve_states(call, leaving.blocks, way.threads)
    if layout.is_flat and len(leaving.taps) == 1:
        return (kept[0],)  # nobody else has it
    return tuple([layout.unflatten(kept[leaving.blocks.index(block)])[index].clone() for index, block in leaving.taps])


def _may_measure(initial: Tensor) -> bool:
    """Whether time can be taken here, on this tensor's device."""
    if not is_plain_call() or not is_plain(initial):
        return False
    return initial.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
