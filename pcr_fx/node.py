"""The solve node: the module that stands in a rewritten graph where a chain stood."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from pcr_fx.body import Signature
from pcr_fx.body.isolation import is_plain_call, is_transformed, is_undisturbed, wants_every_op
from pcr_fx.body.written_out import may_raise
from pcr_fx.chain import Chain, Leaving
from pcr_fx.derivatives import Solve
from pcr_fx.errors import BodyError
from pcr_fx.heads import OutputsBehind
from pcr_fx.looks import have_batched_tangents, plain_look, raised
from pcr_fx.manners import HEAVY, Manner, fastest_manner
from pcr_fx.operands import Given, Operand, in_place, look, parts_of, stacked
from pcr_fx.options import Options
from pcr_fx.planner import Choice, Plan
from pcr_fx.record import SolveRecord
from pcr_fx.routes import ROUTES, Route, Routes, Where
from pcr_fx.straight import Back, Straight
from pcr_fx.sweep import Sweep
from pcr_fx.sweeps import Joints, Sweeps
from pcr_fx.ways import IN_SEQUENCE, evaluate_whole

# Who is told of new nodes.
_listening: list[list[SolveNode]] = []


@contextlib.contextmanager
def nodes_made() -> Iterator[list[SolveNode]]:
    """All nodes that are made meanwhile, whatever the way in."""
    made: list[SolveNode] = []
    _listening.append(made)
    try:
        yield made
    finally:
        _listening[:] = [one for one in _listening if one is not made]


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
        own = () if family is None else (family.plan, family.told)
        self.routes = Routes(chain, options, plan, self.record.name, *own)
        self._outputs = None if chain.head is None else OutputsBehind(chain.head, chain.length, self.record.name)
        self.takes(leaving or Leaving((), tuple(range(chain.num_states))))
        for made in _listening:
            made.append(self)

    def takes(self, leaving: Leaving) -> None:
        """Have calls return this."""
        self.leaving, self.of_solve = leaving, leaving.of_solve(self.chain)
        self.has_places = any(place is not None for place in leaving.places)
        self._sweeps = Sweeps(self.chain, leaving, self.record.name, self._joints)
        self._straight: dict[Any, tuple[Route, Straight]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> SolveNode:
        # Plans are immutable and shared; what happened at a node is its own.
        leaving = self.leaving if self.is_in_graph else None
        node = SolveNode(self.chain, self.options, self.plan, leaving, self.family)
        node.routes.known = copy.copy(self.routes.known)
        node.training = self.training
        memo[id(self)] = node
        return node

    def with_own_record(self) -> SolveNode:
        """The node with all that it has found out, and a record of what happens from here on."""
        node = copy.copy(self)
        node.record, node._straight = SolveRecord(self.record.name), {}
        return node

    def forward(
        self,
        states: Sequence[Tensor],
        operands: Sequence[Operand],
        shared: Sequence[Tensor],
        head_operands: Sequence[Operand] = (),
        head_shared: Sequence[Tensor] = (),
    ) -> tuple[Any, ...]:
        """What leaves the chain, called with what `Given` has.

        Returns:
            Trajectories and outputs `[L, ...]`, then taps. Left to the model's own ops in a graph, the former are lists.
        """
        given = Given(states, operands, shared, head_operands, head_shared)
        if torch.autograd._profiler_enabled():
            with torch.autograd.profiler.record_function(f"pcr_fx: {self.record.name}"):
                return self._run(given)
        return self._run(given)

    def _run(self, given: Given) -> tuple[Any, ...]:
        """What leaves the chain, by the route of such tensors."""
        is_plain = is_plain_call()
        states, operands, shared, *_ = given
        if not is_plain and self._is_for_the_blocks(given):
            return self.as_written(given)
        seen = [look(operand) for operand in operands] if is_plain else []
        key = plain_look(states, seen, shared) if is_plain else None
        is_plain = key is not None
        if key is None:
            key = self.routes.look(states, operands, shared)
        route = self.routes.known.get(key)
        if route is None or not route.is_final:
            route = self.routes.find(key, route, is_plain, states, operands, shared)
        if is_plain and self.record.is_differentiated_twice and torch.is_grad_enabled() and is_undisturbed():
            return self.as_written(given)
        if route.where in (Where.EAGER, Where.UNSOLVABLE):
            left_alone = route.where is Where.EAGER
            return self._timed(route, states, partial(self.as_written, given, left_alone))
        if route.where is Where.IN_PLACE:
            present = list(map(in_place, operands, seen))
            if self._sweeps.are_wanted and not self._may_raise:
                leaves = self._whole(key, route, given, present)
                if leaves is not None:
                    return leaves
            straight = self._straight_by(key, route, states)
            solved = self._timed(route, states, partial(straight.run, states, present, shared))
        else:
            solved = self._by_operators(route, states, operands, shared)
        if self._may_raise and is_plain and not all(bool(part.isfinite().all()) for part in solved):
            return self.as_written(given)  # there is an error to raise, if it is one
        if self._outputs is not None:
            solved = self._with_outputs(self._outputs, given, solved)
        return self.placed(solved) if self.has_places else solved

    def _is_for_the_blocks(self, given: Given) -> bool:
        """Whether something looks on that only the blocks themselves can serve; results under a transform may not be looked at."""
        if wants_every_op() or (self._may_raise and is_transformed()):
            return True
        return have_batched_tangents(*given[:3])

    def _straight_by(self, key: Any, route: Route, states: Sequence[Tensor]) -> Straight:
        """How calls of a route go straight to native code; made anew where there is another route than there was."""
        known = self._straight.get(key)
        if known is not None and known[0] is route:
            return known[1]
        assert isinstance(route.plan, Plan) and route.way is not None
        back = Back(route.way_back or route.way, route.watch_back, self._doubter(route, states))
        straight = Straight(route.plan, route.way, back, self.record, self.of_solve)
        self._straight[key] = route, straight
        if len(self._straight) > ROUTES:
            self._straight.pop(next(iter(list(self._straight))), None)  # other threads may be at it, too
        return straight

    def _whole(self, key: Any, route: Route, given: Given, present: Sequence[Any]) -> tuple[Any, ...] | None:
        """All that leaves the chain, by a sweep or by the blocks; `None` where outputs are to be computed behind the states.

        Args:
            present: per-block operands as kernels take them.
        """
        assert isinstance(route.plan, Plan) and route.way is not None
        ways, states, head = (route.way, route.way_back or route.way), given.states, given[3:]
        judge = partial(self._manner, key, route, given)
        sweep = self._sweeps.of(key, route.plan, ways, states, *head, judge)
        if isinstance(sweep, Sweep):
            run = partial(self._swept, sweep, route, given._replace(operands=present))
            return self._timed(route, states, run, sweep.joined is not None)
        return self.as_written(given, left_alone=True) if sweep is Manner.AS_WRITTEN else None

    def _swept(self, sweep: Sweep, route: Route, given: Given) -> tuple[Any, ...]:
        """What leaves the chain in one sweep."""
        doubter = self._doubter(route, given.states)
        back = Back(sweep.way_back, route.watch_back, doubter, sweep.joined is not None)
        own: Any = given.operands, given.shared
        return sweep.run(self.record, back, given.states, own, (given.head_operands, given.head_shared))

    def _manner(self, key: Any, route: Route, given: Given, sweep: Sweep | None) -> Manner:
        """How outputs are computed: measured where ways are, and where there is much to compute."""
        usual = Manner.BEHIND if sweep is None else Manner.SWEPT
        plan = route.plan
        if self._outputs is None or route.way is None or not isinstance(plan, Plan) or not is_undisturbed():
            return usual
        samples = plan.samples_of(given.states)
        choice = plan.choice(samples)
        if sweep is not None:
            operations = sweep.way.kernel.operations[0] - route.way.kernel.operations[0]
            if operations * samples < HEAVY:
                return usual
        if self.options.planning != "measured" or choice.asked_for or not choice.timings:
            return usual
        behind, straight = self._outputs, self._straight_by(key, route, given.states)

        def computed_behind(given: Given) -> Sequence[Tensor]:
            own: Any = given[:3]
            solved = self._with_outputs(behind, given, straight.run(*own))
            return self.placed(solved) if self.has_places else solved

        manners: dict[Manner, Any] = {Manner.BEHIND: computed_behind}
        if sweep is not None:
            manners[Manner.SWEPT] = partial(self._swept, sweep, route)
        return fastest_manner(manners, self.as_written, given, choice, self.options.planning_budget)

    def placed(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What leaves the chain, `[L, ...]` where it is whole, in the places that it is to have."""
        places = [*self.leaving.places, *(None for _ in leaves[len(self.leaving.places) :])]
        return tuple([one if place is None else place.filled(one) for one, place in zip(leaves, places, strict=True)])

    def _timed(
        self, route: Route, states: Sequence[Tensor], run: Callable[[], tuple[Any, ...]], has_more: bool = False
    ) -> tuple[Any, ...]:
        """What `run` returns, which is watched now and then.

        Args:
            has_more: whether it does more than was measured of the route.
        """
        watch = route.watch
        began = perf_counter() if watch is not None and watch.begins() else None
        found = run()
        if began is not None and watch.ended(perf_counter() - began, has_more):  # type: ignore[union-attr]
            self._doubter(route, states)()
        return found

    def _doubter(self, route: Route, states: Sequence[Tensor]) -> Callable[[], None]:
        """Has the plan look again, and calls ask it where they go."""
        plan = route.plan
        return partial(self.routes.doubt, plan, plan.samples_of(states)) if isinstance(plan, Plan) else lambda: None

    def _with_outputs(self, behind: OutputsBehind, given: Given, solved: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What leaves the chain, of what the solve returned: all trajectories, and those taps that are states."""
        count = self.chain.num_states
        trajectories, states_taken = list(solved[:count]), iter(solved[count:])
        head = list(map(stacked, given.head_operands)), given.head_shared
        values = [*trajectories, *behind.of(given.states, trajectories, *head)]
        taps = [
            next(states_taken) if index < count else values[index][block].clone() for index, block in self.leaving.taps
        ]
        return (*(values[index] for index in self.leaving.whole), *taps)

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

    def as_written(self, given: Given, left_alone: bool = False) -> tuple[Any, ...]:
        """What leaves the chain, by the blocks as the model wrote them, under plain autograd.

        Args:
            left_alone: whether that is because nothing is faster.
        """
        if self.chain.own_op is not None:
            self._note_own(left_alone)
            leaves: tuple[Any, ...] = self.chain.own_op(given.states, list(map(stacked, given.operands)), given.shared)
            return leaves
        wanted = None if self.leaving.whole else {block for _, block in self.leaving.taps}
        parts = [
            (list(map(parts_of, operands)), shared)
            for operands, shared in ((given.operands, given.shared), (given.head_operands, given.head_shared))
        ]
        found = evaluate_whole(self.chain, given.states, parts, wanted)
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

    def learn(self, plan: Plan) -> None:
        """Take a plan made before the first call."""
        self.routes.learn(plan)

    def plan_for(
        self, states: Sequence[Tensor], operands: Sequence[Operand], shared: Sequence[Tensor]
    ) -> Plan | BodyError:
        """The plan for such tensors, or the reason why there is none."""
        return self.routes.plan_for(states, operands, shared)

    @property
    def outcome(self) -> Plan | BodyError | None:
        """The latest plan, or the reason why there is none; `None` before the first call."""
        return self.routes.outcome

    @property
    def choice(self) -> Choice | None:
        """The latest choice among ways, as far as this node made one."""
        return self.routes.choice
