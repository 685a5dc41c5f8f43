"""The solve node: the module that stands in a rewritten graph where a chain stood."""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pcr_fx import ops
from pcr_fx.body import Program, Signature, StateLayout
from pcr_fx.chain import Chain, TensorSpec
from pcr_fx.errors import BodyError
from pcr_fx.kernels import ChainKernel, PointerTable
from pcr_fx.options import Options
from pcr_fx.planner import Choice, Plan, make_plan, plan_by_key
from pcr_fx.solvers import Outcome, SolveStats, blocks

log = logging.getLogger(__name__)

# Solved in float32: Newton needs digits to converge by, and a state in float16 or bfloat16 has two or three.
_LOW_PRECISION = (torch.float16, torch.bfloat16)
_SOLVED_DTYPES = (torch.float32, torch.float64)
_PLAIN = (Tensor, nn.Parameter, PointerTable)
# States that are wanted: (which of the chain's states, after which block).
Taps = Sequence[tuple[int, int]]
_IN_SEQUENCE = SolveStats(Outcome.SEQUENTIAL)


class _Solve(torch.autograd.Function):
    """The trajectory as a differentiable function of the initial state and all operands."""

    generate_vmap_rule = True

    @staticmethod
    def forward(initial: Tensor, plan: str, record: int, num_operands: int, *tensors: Tensor) -> Tensor:
        return ops.solve(initial, list(tensors[:num_operands]), list(tensors[num_operands:]), plan, record)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        initial, ctx.plan, ctx.record, ctx.num_operands, *tensors = inputs
        ctx.save_for_backward(initial, output, *tensors)

    @staticmethod
    def backward(ctx: Any, cotangents: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        initial, trajectory, *tensors = ctx.saved_tensors
        program = plan_by_key(ctx.plan).program
        needs = [*program.differentiable_operands, *program.differentiable_shared]
        d_initial, *rest = _Adjoint.apply(
            initial, trajectory, cotangents, ctx.plan, ctx.record, ctx.num_operands, *tensors
        )
        waiting = iter(rest)
        return d_initial, None, None, None, *(next(waiting) if need else None for need in needs)


class _KernelSolve(torch.autograd.Function):
    """`_Solve` by the chain's kernel, for plain calls: less than half of what `_Solve` and its operators cost.

    Returns the states at `taps`, or without them the trajectory. Of operands read in place the blocks' own tensors are
    inputs, and get their gradients as views of one: to stack thousands, and take the gradient apart again, in autograd
    would double the cost.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        plan: Plan,
        record: ops.SolveRecord,
        taps: Taps | None,
        operands: Sequence[Tensor | PointerTable],
        shared: Sequence[Tensor],
        initial: Tensor,
        *tensors: Tensor,
    ) -> Tensor | tuple[Tensor, ...]:
        """`tensors`: the operands, tables as their tensors, then the shared operands."""
        ctx.plan, ctx.record, ctx.taps = plan, record, taps
        ctx.set_materialize_grads(False)
        trajectory = _kernel(plan).solve(initial, [*operands, *plan.program.literals], shared)
        if any(ctx.needs_input_grad):
            ctx.inputs = _SavedInputs(operands, len(shared))
            ctx.save_for_backward(initial, trajectory, *(t for t in operands if isinstance(t, Tensor)), *shared)
        return trajectory if taps is None else _tapped(plan.program.layout, trajectory, taps)

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Any, ...]:
        if all(part is None for part in given):
            return (None,) * len(ctx.needs_input_grad)
        initial, trajectory, *saved = ctx.saved_tensors
        plan: Plan = ctx.plan
        program, kernel = plan.program, _kernel(plan)
        cotangents = {} if ctx.taps is None else _by_block(program.layout, initial, ctx.taps, given)
        parts = given if ctx.taps is None else tuple(cotangents.values())
        rest: Sequence[Tensor]
        # Not where a gradient is differentiated in turn, or many are taken at once.
        plain = not torch.is_grad_enabled() and _is_plain_call() and all(type(part) is Tensor for part in parts)
        if plain and kernel.is_ready("adjoint", initial):
            operands, shared = ctx.inputs.in_place(saved)
            among = cotangents if ctx.taps is not None else given[0]
            every = [*operands, *program.literals]
            d_initial, *rest = kernel.solve_adjoint(initial, trajectory, every, shared, among)  # type: ignore[arg-type]
            ctx.record.backward("sequential", False)
        else:
            stacked = ctx.inputs.stacked(saved)
            dense = given[0]
            if ctx.taps is not None:
                zero = torch.zeros_like(initial)
                dense = torch.stack([cotangents.get(block, zero) for block in range(program.length)])
            count = program.chain.num_operands
            d_initial, *rest = _Adjoint.apply(initial, trajectory, dense, plan.key, ctx.record.id, count, *stacked)
        waiting = iter(rest)
        needs = [*program.differentiable_operands, *program.differentiable_shared]
        gradients = [next(waiting) if need else None for need in needs]
        return None, None, None, None, None, d_initial, *ctx.inputs.spread(gradients)


class _SavedInputs:
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


def _kernel(plan: Plan) -> ChainKernel:
    assert isinstance(plan.kernel, ChainKernel), plan.kernel
    return plan.kernel


def _tapped(layout: StateLayout, trajectory: Tensor, taps: Taps) -> tuple[Tensor, ...]:
    """The states at `taps`, copied: a view would keep the trajectory alive, and pass writes to it on to the backward."""
    return tuple([layout.unflatten(trajectory[block])[index].clone() for index, block in taps])


def _by_block(layout: StateLayout, initial: Tensor, taps: Taps, given: Sequence[Tensor | None]) -> dict[int, Tensor]:
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
        return tuple(ops.adjoint(initial, trajectory, operands, shared, cotangents, plan, record))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        initial, _, cotangents, ctx.plan, _, ctx.num_operands, *tensors = inputs
        ctx.save_for_backward(initial, cotangents, *tensors)

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        initial, cotangents, *tensors = ctx.saved_tensors
        program = plan_by_key(ctx.plan).program
        needs = [True, *program.differentiable_operands, *program.differentiable_shared]
        primals = [initial, *tensors]
        active = [primal for primal, need in zip(primals, needs, strict=True) if need]

        def gradients(cotangents: Tensor, *active: Tensor) -> tuple[Tensor, ...]:
            def trajectory(*active: Tensor) -> Tensor:
                waiting = iter(active)
                every = [next(waiting) if need else fixed for need, fixed in zip(needs, primals, strict=True)]
                return unrolled(program, every[0], every[1 : 1 + ctx.num_operands], every[1 + ctx.num_operands :])

            return torch.func.vjp(trajectory, *active)[1](cotangents)

        d_cotangents, *d_active = torch.func.vjp(gradients, cotangents, *active)[1](tuple(seconds))
        waiting = iter(d_active)
        d_initial, *d_tensors = (next(waiting) if need else None for need in needs)
        # The trajectory is a function of the other inputs, which `unrolled` computes again.
        return d_initial, None, d_cotangents, None, None, None, *d_tensors


def unrolled(program: Program, initial: Tensor, operands: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
    """The trajectory `[L, *batch, d]` block by block, in the model's own ops, which any transform can differentiate."""
    layout, states, trajectory = program.layout, program.layout.unflatten(initial), []
    for block in blocks([*operands, *program.literals], program.length):
        states = tuple(program.chain.body(*states, *block, *shared))
        trajectory.append(layout.flatten(states))
    return torch.stack(trajectory)


Operand: TypeAlias = "Tensor | StackedAttributes | PointerTable"


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
        self.record = ops.SolveRecord(chain.origin.modules or "a chain")
        self._planned: dict[Signature, Plan | BodyError] = {}
        self.choice: Choice | None = None
        self._dtypes: dict[Any, tuple[torch.dtype, ...]] = {}
        self._kernels: dict[Any, Plan] = {}

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
        key: Any = None
        given: list[Any] = list(operands)
        if _is_plain_call():
            given = [operand.read() if isinstance(operand, StackedAttributes) else operand for operand in operands]
            key = _look([*states, *given, *shared])
            if key in self._kernels:
                return self._by_kernel(self._kernels[key], states, given, shared)
        trajectories = self._by_operator(states, [_stacked(operand) for operand in operands], shared)
        if key is not None and self._runs_as_kernel([*states, *given, *shared]):
            assert isinstance(self.outcome, Plan)
            self._kernels[key] = self.outcome
        if self.taps is None:
            return trajectories
        return tuple([trajectories[index][block].clone() for index, block in self.taps])

    def _runs_as_kernel(self, tensors: Sequence[Tensor | PointerTable]) -> bool:
        """Whether the latest call did, and one with such tensors may go straight there."""
        plan = self.outcome
        # Low precision is solved in float32, by way of copies.
        if not isinstance(plan, Plan) or any(tensor.dtype != plan.program.dtype for tensor in tensors):
            return False
        states: Any = tensors[: self.chain.num_states]
        initial = plan.program.layout.flatten(states)
        choice = plan.choice(initial)
        return choice.is_native and choice.kernel is not None and choice.kernel.is_ready("forward", initial)

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
            tapped = _KernelSolve.apply(plan, self.record, self.taps, operands, shared, initial, *tensors, *shared)
            return tapped if self.taps is not None else layout.unflatten(tapped, leading=1)
        trajectory = _kernel(plan).solve(initial, [*operands, *plan.program.literals], shared)
        return layout.unflatten(trajectory, leading=1) if self.taps is None else _tapped(layout, trajectory, self.taps)

    def _by_operator(
        self, states: Sequence[Tensor], operands: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], ...]:
        plan = self.plan or self.plan_for(states, operands, shared)
        if isinstance(plan, BodyError):
            return self._block_by_block(states, operands, shared)
        layout = plan.program.layout
        initial = layout.flatten([_raised(state) for state in states])
        if self.plan is None:
            self.choice = plan.choice(initial)
        if self.choice is not None and self.choice.leaves_alone(torch.is_grad_enabled()):
            return self._block_by_block(states, operands, shared)
        tensors = [_raised(tensor) for tensor in (*operands, *shared)]
        trajectory: Tensor = _Solve.apply(initial, plan.key, self.record.id, len(operands), *tensors)
        dtypes = self._output_dtypes(states, operands, shared)
        trajectories = layout.unflatten(trajectory, leading=1)
        return tuple(part.to(dtype) for part, dtype in zip(trajectories, dtypes, strict=True))  # type: ignore[misc]

    def learn(self, plan: Plan) -> None:
        """Take a plan made before the first call."""
        self._planned[plan.program.signature] = plan

    def plan_for(
        self, states: Sequence[Tensor], operands: Sequence[Tensor], shared: Sequence[Tensor]
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

    def _block_by_block(
        self, states: Sequence[Tensor], operands: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> tuple[list[Tensor], ...]:
        """The blocks as the model wrote them, under plain autograd."""
        trajectory = []
        numbers = list(zip(*self.chain.literals, strict=True)) or [()] * self.chain.length
        for block, values in zip(blocks(operands, self.chain.length), numbers, strict=True):
            states = self.chain.body(*states, *block, *values, *shared)
            trajectory.append(states)
        self.record.forward("sequential", _IN_SEQUENCE)
        self.record.solver_backward = "sequential"
        return tuple(list(part) for part in zip(*trajectory, strict=True))


def _is_plain_call() -> bool:
    """Whether nothing looks on that wants to see operators: no compiler, function transform, mode or autocast."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch.is_autocast_enabled("cpu")
    )


def _look(tensors: Sequence[Tensor | PointerTable]) -> Any:
    """All that decides which kernel a plain call may go to; `None` where it may go to none."""
    looks = []
    for tensor in tensors:
        if type(tensor) not in _PLAIN or (type(tensor) is not PointerTable and tensor.device.type != "cpu"):
            return None
        looks.append((type(tensor) is PointerTable, tensor.shape, tensor.dtype))
    return tuple(looks)


def _stacked(operand: Operand) -> Tensor:
    if isinstance(operand, StackedAttributes):
        return operand.stacked()
    return torch.stack(operand.tensors) if isinstance(operand, PointerTable) else operand


def signature_of(states: Sequence[Tensor], operands: Sequence[Tensor], shared: Sequence[Tensor]) -> Signature:
    """What a plan for these tensors is made for; per-block operands come stacked, `[L, ...]`."""

    def spec(tensor: Tensor, shape: Sequence[int]) -> TensorSpec:
        return TensorSpec(tuple(int(size) for size in shape), solved_dtype(tensor.dtype), tensor.device)

    return Signature(
        tuple(spec(tensor, tensor.shape) for tensor in states),
        tuple(spec(tensor, tensor.shape[1:]) for tensor in operands),
        tuple(spec(tensor, tensor.shape) for tensor in shared),
    )


def solved_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a tensor is solved in."""
    return torch.float32 if dtype in _LOW_PRECISION else dtype


def _raised(tensor: Tensor) -> Tensor:
    return tensor.to(solved_dtype(tensor.dtype))


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(*tensors: Tensor) -> Tensor:
        return ops.stack(list(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return cotangent.unbind(0)


def stack_operands(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack(tensors)` as one operator that no compiler takes apart."""
    return _Stack.apply(*tensors)


@dataclass
class Source:
    """Where a module keeps a tensor, to be looked up at each call: so `.to()`, `load_state_dict(assign=True)` and
    optimisers that exchange parameters are seen.

    Attributes:
        path: the attribute's name in the model.
        holder: `module._parameters`, `module._buffers`, or whatever else holds it by `name`.
    """

    path: str
    holder: Any
    name: Any


class Attributes(nn.Module):
    """The present values of some attributes, as a list; of per-block operands what can stack or read them.

    One module for all of a graph: to call one costs a microsecond.
    """

    def __init__(self, sources: Sequence[Source | StackedAttributes]) -> None:
        super().__init__()
        self.sources = list(sources)

    def forward(self) -> list[Any]:
        return [
            source if type(source) is StackedAttributes else source.holder[source.name]  # type: ignore[union-attr]
            for source in self.sources
        ]


class Watched(dict[str, Any]):
    """The parameters or buffers of a module; counts how often one has been exchanged for another.

    So a chain with thousands of them need not look each up to know that they are the same objects still.
    """

    def __init__(self, values: Mapping[str, Any], changes: list[int]) -> None:
        super().__init__(values)
        self.changes = changes

    def __setitem__(self, name: str, value: Any) -> None:
        self.changes[0] += 1
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self.changes[0] += 1
        super().__delitem__(name)

    def pop(self, *arguments: Any) -> Any:
        self.changes[0] += 1
        return super().pop(*arguments)

    def update(self, *arguments: Any, **values: Any) -> None:
        self.changes[0] += 1
        super().update(*arguments, **values)

    def clear(self) -> None:
        self.changes[0] += 1
        super().clear()

    def setdefault(self, name: str, default: Any = None) -> Any:
        self.changes[0] += 1
        return super().setdefault(name, default)

    def popitem(self) -> tuple[str, Any]:
        self.changes[0] += 1
        return super().popitem()

    def __ior__(self, values: Any) -> Watched:  # type: ignore[override,misc]
        self.update(values)
        return self

    def __reduce__(self) -> Any:
        return Watched, (dict(self), self.changes)


class StackedAttributes:
    """One per-block operand, of the parameters or buffers of the blocks.

    It stacks them, `[L, ...]`, or tells a kernel where they lie.

    Args:
        sources: the attributes of the blocks.
        changes: how often, so far, any attribute of the model was exchanged for another.
    """

    def __init__(self, sources: Sequence[Source], changes: list[int]) -> None:
        self.sources = list(sources)
        self.changes = changes
        self.table: PointerTable | None = None
        self._seen = -1

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(source.path for source in self.sources)

    def values(self) -> list[Any]:
        return [source.holder[source.name] for source in self.sources]

    def stacked(self) -> Tensor:
        return torch.stack(self.values())

    def read(self) -> PointerTable | Tensor:
        """For a kernel: where they lie, if they can be read there; else stacked."""
        table = self._present_table()
        return self.stacked() if table is None else table

    def _present_table(self) -> PointerTable | None:
        if self._seen != self.changes[0] or (self.table is not None and not self.table.holds()):
            self._seen = self.changes[0]
            # Parts of a packed parameter are views, made anew each time.
            in_place = all(isinstance(source.holder, dict) for source in self.sources)
            self.table = PointerTable.of(self.values()) if in_place else None
        return self.table

    def __getstate__(self) -> dict[str, Any]:
        # A copy has tensors of its own, which lie elsewhere.
        return {**self.__dict__, "table": None}


class InputColumn(nn.Module):
    """One per-block operand of tensors that each call is given, as a compiler gives parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.table: PointerTable | None = None

    def forward(self, tensors: list[Tensor]) -> Tensor | PointerTable:
        """For a kernel: where they lie, if they can be read there; else stacked."""
        if not _is_plain_call():
            return stack_operands(tensors)
        table = self.table
        if table is None or not all(map(operator.is_, tensors, table.tensors)) or not table.holds():
            table = self.table = PointerTable.of(tensors)
        return stack_operands(tensors) if table is None else table
