"""The solve node: the module that stands in a rewritten graph where a chain stood."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pcr_fx.body import Signature
from pcr_fx.body.isolation import is_plain_call, is_undisturbed
from pcr_fx.call import Call
from pcr_fx.chain import Chain, TensorSpec
from pcr_fx.derivatives import KernelSolve, Solve, Taps, native_kernel, tapped
from pcr_fx.errors import BodyError
from pcr_fx.operands import Operand, StackedAttributes, parts_of, stacked
from pcr_fx.options import Options
from pcr_fx.planner import Choice, Plan, make_plan
from pcr_fx.record import SolveRecord
from pcr_fx.solvers import Outcome, SolveStats, blocks
from pcr_fx.targets import CppKernel, PointerTable

log = logging.getLogger(__name__)

# Solved in float32: Newton needs digits to converge by, and a state in float16 or bfloat16 has two or three.
_LOW_PRECISION = (torch.float16, torch.bfloat16)
_SOLVED_DTYPES = (torch.float32, torch.float64)
_PLAIN = (Tensor, nn.Parameter, PointerTable)
_IN_SEQUENCE = SolveStats(Outcome.SEQUENTIAL)


class SolveNode(nn.Module):
    """Evaluates a chain: `(states, operands, shared) -> trajectories`.

    Args:
        chain: what to evaluate.
        options: how.
        plan: made beforehand, when the shapes of every call are known to match it (a compiler's guards see to that).
            Without one the node plans at the first call of each signature.
        taps: the states to return, each a copy; without them whole trajectories are returned.
    """

    def __init__(self, chain: Chain, options: Options, plan: Plan | None = None, taps: Taps | None = None) -> None:
        super().__init__()
        self.taps = taps
        self.chain = chain
        self.options = options
        self.plan = plan
        self.record = SolveRecord(chain.origin.modules or "a chain")
        self._planned: dict[Signature, Plan | BodyError] = {}
        self.choice: Choice | None = None
        self._dtypes: dict[Any, tuple[torch.dtype, ...]] = {}
        # By the look of a call's tensors.
        self._kernels: dict[Any, Plan] = {}
        self._left_alone: set[Any] = set()
        self._by_operators: set[Any] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> SolveNode:
        # Plans are immutable and shared; what happened at a node is its own.
        node = SolveNode(self.chain, self.options, self.plan, self.taps)
        node._planned = copy.copy(self._planned)
        node.training = self.training
        memo[id(self)] = node
        return node

    def forward(
        self, states: Sequence[Tensor], operands: Sequence[Operand], shared: Sequence[Tensor]
    ) -> tuple[Any, ...]:
        """The states of the chain.

        Args:
            states: the initial states.
            operands: per-block operands, `[L, ...]`, or what can stack them or tell where they lie.
            shared: shared operands.

        Returns:
            The states at the taps, or for each state its trajectory `[L, *state]`.
        """
        if is_plain_call():
            given = [operand.read() if isinstance(operand, StackedAttributes) else operand for operand in operands]
            key = _look([*states, *given, *shared])
            if key is not None and key not in self._kernels and key not in self._left_alone:
                self._route(key, states, given, shared)
            if key in self._kernels:
                return self._by_kernel(self._kernels[key], states, given, shared)
            if key in self._left_alone:
                return self._wanted(self._left_as_it_is(states, operands, shared))
        return self._wanted(self._by_operator(states, operands, shared))

    def _wanted(self, trajectories: Sequence[Any]) -> tuple[Any, ...]:
        """The states at the taps, if there are any."""
        if self.taps is None:
            return tuple(trajectories)
        # What the model's own ops made is nobody else's.
        states = [trajectories[index][block] for index, block in self.taps]
        return tuple([state if isinstance(trajectories[0], dict) else state.clone() for state in states])

    def _route(
        self, key: Any, states: Sequence[Tensor], operands: Sequence[Tensor | PointerTable], shared: Sequence[Tensor]
    ) -> None:
        """Find out whether calls with such tensors may go straight somewhere, from the first one on.

        A call that took another way than the one before would save other tensors, which checkpoints compare: their way
        stays what it is.
        """
        plan = self.plan or self.plan_for(states, operands, shared)
        # Low precision is solved in float32, by way of copies.
        if isinstance(plan, BodyError) or any(t.dtype != plan.program.dtype for t in (*states, *operands, *shared)):
            return
        with plan.lock:
            if key not in self._kernels and key not in self._left_alone:
                self._route_by(plan, key, states, operands, shared)

    def _route_by(
        self,
        plan: Plan,
        key: Any,
        states: Sequence[Tensor],
        operands: Sequence[Tensor | PointerTable],
        shared: Sequence[Tensor],
    ) -> None:
        if key in self._by_operators and not is_undisturbed():
            return
        initial, kernel = plan.program.layout.flatten(states), plan.kernel
        if self.plan is None:
            self.choice = self.choose(plan, initial, operands, shared)
        choice = plan.choice(plan.samples(initial))
        if self._is_left_alone(choice):
            self._left_alone.add(key)
            return
        self._by_operators.add(key)
        is_native = choice.is_native(torch.is_grad_enabled())
        if is_native and isinstance(kernel, CppKernel) and kernel.is_ready("forward", initial):
            self._kernels[key] = plan

    def _is_left_alone(self, choice: Choice) -> bool:
        return choice.leaves_alone(torch.is_grad_enabled())

    def _by_kernel(
        self, plan: Plan, states: Sequence[Tensor], operands: Sequence[Tensor | PointerTable], shared: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Straight to native code: most of what an operator costs is asking who else wants to know."""
        layout = plan.program.layout
        initial = layout.flatten(states)
        self.record.forward("sequential", _IN_SEQUENCE)
        tensors = [
            tensor
            for operand in operands
            for tensor in (operand.tensors if isinstance(operand, PointerTable) else (operand,))
        ]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (initial, *tensors, *shared)):
            solved = KernelSolve.apply(plan, self.record, self.taps, operands, shared, initial, *tensors, *shared)
            return solved if self.taps is not None else layout.unflatten(solved, leading=1)
        trajectory = native_kernel(plan).solve(Call(initial, [*operands, *plan.program.literals], shared))
        return layout.unflatten(trajectory, leading=1) if self.taps is None else tapped(layout, trajectory, self.taps)

    def _by_operator(
        self, states: Sequence[Tensor], operands: Sequence[Operand], shared: Sequence[Tensor]
    ) -> tuple[Any, ...]:
        plan = self.plan or self.plan_for(states, operands, shared)
        if isinstance(plan, BodyError):
            return self._block_by_block(states, operands, shared)
        layout = plan.program.layout
        initial = layout.flatten([_raised(state) for state in states])
        if self.plan is None:
            self.choice = self.choose(plan, initial, operands, shared)
        if self.choice is not None and self._is_left_alone(self.choice):
            return self._left_as_it_is(states, operands, shared)
        self.record.prepare(plan, initial.device)
        columns = [stacked(operand) for operand in operands]
        tensors = [_raised(tensor) for tensor in (*columns, *shared)]
        trajectory: Tensor = Solve.apply(initial, plan.key, self.record.id, len(operands), *tensors)
        dtypes = self._output_dtypes(states, columns, shared)
        trajectories = layout.unflatten(trajectory, leading=1)
        return tuple(part.to(dtype) for part, dtype in zip(trajectories, dtypes, strict=True))  # type: ignore[misc]

    def choose(self, plan: Plan, initial: Tensor, operands: Sequence[Operand], shared: Sequence[Tensor]) -> Choice:
        """What is to run these tensors: measured on them where that is wanted, and where nothing looks on."""
        samples, needs_gradient = plan.samples(initial), torch.is_grad_enabled()
        if not plan.wants_measuring(samples, needs_gradient) or not _may_measure(initial):
            return plan.choice(samples)
        # A checkpoint computes again what it computed, and compares what is saved: no time to change the way.
        if plan.wants_another_look(samples) and not is_undisturbed():
            return plan.choice(samples)
        with torch.no_grad():
            every = [*(_raised(stacked(operand)) for operand in operands), *plan.program.literals]
            are_stacked = not all(isinstance(operand, Tensor) for operand in operands)
            call = Call(initial, every, [_raised(tensor) for tensor in shared])
            return plan.measure(call, needs_gradient, are_stacked)

    def learn(self, plan: Plan) -> None:
        """Take a plan made before the first call."""
        self._planned[plan.program.signature] = plan

    def plan_for(
        self, states: Sequence[Tensor], operands: Sequence[Operand], shared: Sequence[Tensor]
    ) -> Plan | BodyError:
        """The plan for these tensors, or the reason why there is none."""
        signature = signature_of(states, operands, shared)
        if signature not in self._planned:
            try:
                self._planned[signature] = make_plan(self.chain, signature, self.options)
            except BodyError as reason:
                log.warning("%s runs block by block: %s", self.record.name, reason)
                self._planned[signature] = reason
        return self._planned[signature]

    @property
    def outcome(self) -> Plan | BodyError | None:
        """The latest plan, or the reason why there is none; `None` before the first call."""
        return self.plan or next(reversed(self._planned.values()), None)

    def _output_dtypes(self, *groups: Sequence[Tensor]) -> tuple[torch.dtype, ...]:
        """The dtypes that the model itself would return, which autocast and low precision decide."""
        states = groups[0]
        device = states[0].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if autocast is None and all(
            tensor.dtype in _SOLVED_DTYPES for group in groups for tensor in group if tensor.is_floating_point()
        ):
            return tuple(state.dtype for state in states)
        key = (autocast, *(tensor.dtype for group in groups for tensor in group))
        if key not in self._dtypes:
            self._dtypes[key] = self._native_dtypes(*groups)
        return self._dtypes[key]

    def _native_dtypes(
        self, states: Sequence[Tensor], operands: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> tuple[torch.dtype, ...]:
        signature = Signature(*(tuple(map(TensorSpec.of, group)) for group in (states, operands, shared)))
        with FakeTensorMode():
            current, each, common = (
                [torch.empty(spec.shape, dtype=spec.dtype, device=spec.device) for spec in group]
                for group in (signature.states, signature.operands, signature.shared)
            )
            literals = [values[0] for values in self.chain.literals]
            # Twice: the first block may change the dtype that all others then keep.
            for _ in range(min(2, self.chain.length)):
                current = list(self.chain.body(*current, *(t[0] for t in each), *literals, *common))
        return tuple(state.dtype for state in current)

    def _left_as_it_is(
        self, states: Sequence[Tensor], operands: Sequence[Operand], shared: Sequence[Tensor]
    ) -> tuple[list[Tensor] | dict[int, Tensor], ...]:
        """The blocks as the model wrote them, because nothing is faster."""
        trajectories = self._block_by_block(states, operands, shared)
        self.record.left_alone = True
        return trajectories

    def _block_by_block(
        self, states: Sequence[Tensor], operands: Sequence[Operand], shared: Sequence[Tensor]
    ) -> tuple[list[Tensor] | dict[int, Tensor], ...]:
        """The blocks as the model wrote them, under plain autograd: of each state all values, or by block those wanted.

        A value that nobody wants is let go at once, as the model does: its memory is still in the cache for the next.
        """
        wanted = None if self.taps is None else {block for _, block in self.taps}
        trajectory: dict[int, Sequence[Tensor]] = {}
        numbers = list(zip(*self.chain.literals, strict=True)) or [()] * self.chain.length
        each = blocks([parts_of(operand) for operand in operands], self.chain.length)
        for index, (block, values) in enumerate(zip(each, numbers, strict=True)):
            states = self.chain.body(*states, *block, *values, *shared)
            if wanted is None or index in wanted:
                trajectory[index] = states
        self.record.forward("sequential", _IN_SEQUENCE)
        self.record.solver_backward = "sequential"
        if wanted is None:
            return tuple(list(part) for part in zip(*trajectory.values(), strict=True))
        return tuple({block: found[i] for block, found in trajectory.items()} for i in range(self.chain.num_states))


def _look(tensors: Sequence[Tensor | PointerTable]) -> Any:
    """All that decides which kernel a plain call may go to; `None` where it may go to none."""
    looks: list[Any] = [torch.is_grad_enabled()]
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return None
        if type(tensor) is not PointerTable and (tensor.device.type != "cpu" or tensor.is_neg()):
            return None
        looks.append((type(tensor) is PointerTable, tensor.shape, tensor.dtype))
    return tuple(looks)


def _may_measure(initial: Tensor) -> bool:
    """Whether time can be taken here, on this tensor's device."""
    if not is_plain_call() or type(initial) not in _PLAIN:
        return False
    return initial.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def signature_of(states: Sequence[Tensor], operands: Sequence[Operand], shared: Sequence[Tensor]) -> Signature:
    """What a plan for these tensors is made for; per-block operands come stacked, `[L, ...]`, or in parts."""

    def spec(tensor: Tensor, shape: Sequence[int]) -> TensorSpec:
        return TensorSpec(tuple(int(size) for size in shape), solved_dtype(tensor.dtype), tensor.device)

    def block(operand: Operand) -> TensorSpec:
        if isinstance(operand, Tensor):
            return spec(operand, operand.shape[1:])
        part = parts_of(operand)[0]
        return spec(part, part.shape)

    return Signature(
        tuple(spec(tensor, tensor.shape) for tensor in states),
        tuple(map(block, operands)),
        tuple(spec(tensor, tensor.shape) for tensor in shared),
    )


def solved_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a tensor is solved in."""
    return torch.float32 if dtype in _LOW_PRECISION else dtype


def _raised(tensor: Tensor) -> Tensor:
    return tensor.to(solved_dtype(tensor.dtype))
