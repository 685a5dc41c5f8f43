"""The solver by itself: a chain written by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from pcr_fx.body.isolation import isolated
from pcr_fx.body.reals import to_real
from pcr_fx.chain import Chain, Origin
from pcr_fx.errors import BodyError, UnsupportedError
from pcr_fx.looks import signature_of
from pcr_fx.marks import Framed, NotCaptured
from pcr_fx.node import SolveNode
from pcr_fx.options import Options
from pcr_fx.planner import Plan, make_plan
from pcr_fx.record import SolveRecord
from pcr_fx.solvers import SolveStats
from pcr_fx.steps import captures_of, may_be_captured
from pcr_fx.switches import is_disabled
from pcr_fx.ways import IN_SEQUENCE

# How often a step is captured again because it closes over other numbers; from then on it is traced at each call, which takes
# less than half of the time.
_CAPTURES = 2


@dataclass(frozen=True)
class ChainSolution:
    """What `solve_chain` returns.

    Attributes:
        trajectory: all states, `[L, *state]`; of the structure of `x0`.
    """

    trajectory: Any
    _record: SolveRecord

    @cached_property
    def stats(self) -> SolveStats:
        """How the solve went; a solve on a GPU is waited for."""
        stats = self._record.last
        assert stats is not None
        return stats

    @property
    def final(self) -> Any:
        """The last state."""
        return pytree.tree_map(lambda states: states[-1], self.trajectory)


# Dynamo would break the graph, and compile anew, at each place that it cannot look through; so it does so once, around all.
@torch.compiler.disable(reason="solve_chain runs outside of what is compiled; pcr_fx.scan is part of it")  # type: ignore[untyped-decorator]
def solve_chain(
    step: Callable[[Any, Any, Any], Any],
    x0: Any,
    operands: Any = (),
    *,
    shared: Any = (),
    length: int | None = None,
    options: Any = None,
    start: Any = None,
) -> ChainSolution:
    """Evaluate z_l = step(z_{l-1}, operands_l, shared) for l = 1..L from z_0 = x0, as one system.

    The step is captured once for each form of its arguments, whatever L is; what it closes over is read at each call. Where it
    cannot be captured, or a torch.func transform looks on, it is traced at each call. Within `torch.compile` the graph breaks
    here: `pcr_fx.scan` is part of it.

    Differentiable with respect to `x0`, `operands`, `shared` and every tensor that `step` closes over.

    Args:
        step: one block, made of PyTorch ops on tensors; it is traced, so it may not branch on their values.
        x0: the initial state: a floating or complex tensor, or a pytree of them.
        operands: a pytree of tensors `[L, ...]`, one slice a block.
        shared: a pytree of tensors that all blocks get whole.
        length: L; needed when there are no operands.
        options: an `Options`, or a dict of its fields.
        start: a trajectory for an iteration to start from, in the form that `ChainSolution.trajectory` has. With
            `solver="auto"` it is for the case that an iteration is the fastest; `"sequential"` refuses it.

    Raises:
        UnsupportedError: arguments that are no tensors, disagree about L, or have a dtype that is not supported; a
            start where nothing iterates.
        BodyError: `step` is random, mutates its arguments, or does not return a state like the one it got.
    """
    states, state_spec = pytree.tree_flatten(x0)
    every, operand_spec = pytree.tree_flatten(operands)
    common, shared_spec = pytree.tree_flatten(shared)
    _check(states, every, common)
    length = _length(every, length)
    settings = Options.of(options)
    if start is not None and settings.solver == "sequential":
        raise UnsupportedError('start is for an iteration to start from, and solver="sequential" does not iterate')
    if start is not None:
        settings = replace(settings, start="previous")
    problem = _Problem(step, states, every, common, (state_spec, operand_spec, shared_spec), length, settings, start)
    return _solve(problem)


@dataclass(frozen=True, eq=False)
class _Problem:
    """What `solve_chain` was given, as lists of tensors and the structures that they belong into."""

    step: Callable[[Any, Any, Any], Any]
    states: list[Tensor]
    operands: list[Tensor]
    shared: list[Tensor]
    structure: tuple[Any, Any, Any]
    length: int
    settings: Options
    start: Any

    def check_structure(self, spec: Any) -> None:
        if spec != self.structure[0]:
            raise UnsupportedError(f"step must return a state of the structure of x0, {self.structure[0]}, got {spec}")

    def check_states(self, found: Sequence[Any]) -> None:
        """Whether a step returned states like those that it was given."""
        for state, new in zip(self.states, found, strict=True):
            if not isinstance(new, Tensor):
                raise UnsupportedError(f"step must return tensors, got {type(new).__name__}")
            if new.shape != state.shape or new.dtype != state.dtype:
                raise BodyError(
                    f"step must return a state of the shape and dtype of x0, {list(state.shape)} {state.dtype}, got "
                    f"{list(new.shape)} {new.dtype}"
                )

    def solution(self, states: Sequence[Tensor], record: SolveRecord) -> ChainSolution:
        return ChainSolution(pytree.tree_unflatten(list(states), self.structure[0]), record)


def _solve(problem: _Problem) -> ChainSolution:
    if is_disabled():
        return _step_by_step(problem)
    return _captured(problem) or _traced(problem)


def _step_by_step(problem: _Problem) -> ChainSolution:
    """The solution by a plain loop over the step as it is written."""
    states, (state_spec, operand_spec, shared_spec) = problem.states, problem.structure
    shared = pytree.tree_unflatten(problem.shared, shared_spec)
    every = []
    for index in range(problem.length):
        own = pytree.tree_unflatten([operand[index] for operand in problem.operands], operand_spec)
        states, spec = pytree.tree_flatten(problem.step(pytree.tree_unflatten(states, state_spec), own, shared))
        problem.check_structure(spec)
        problem.check_states(states)
        every.append(states)
    record = SolveRecord(getattr(problem.step, "__name__", "step"))
    record.forward("sequential", IN_SEQUENCE)
    return problem.solution([torch.stack(parts) for parts in zip(*every, strict=True)], record)


# --- a step that was captured, and is not traced again ------------------------------------------------------------------


def _captured(problem: _Problem) -> ChainSolution | None:
    """The solution by a step that Dynamo captured; nothing where it cannot, or where that is no chain."""
    if not may_be_captured((*problem.states, *problem.operands, *problem.shared)):
        return None
    forms = [[(one.shape, one.dtype, one.device) for one in group] for group in (problem.states, problem.shared)]
    slices = [(one.shape[1:], one.dtype, one.device) for one in problem.operands]
    form = ("solve_chain", problem.structure, *map(tuple, (*forms, slices)), torch.is_grad_enabled())
    captures = captures_of(problem.step, form, partial(_stand_ins, problem), _CAPTURES)
    if captures.failure:
        return None
    call = _Call(problem)
    try:
        _, trajectory = captures(_as_scanned(problem), call)
    except (NotCaptured, BodyError, UnsupportedError):
        if call.is_solving:
            raise
        return None
    leaves, spec = pytree.tree_flatten(trajectory)
    problem.check_structure(spec)
    return problem.solution(leaves, call.record)


def _as_scanned(problem: _Problem) -> Callable[[Any, Any], tuple[Any, Any]]:
    """A step that hands its state on, and gives it away."""
    step, shared = problem.step, pytree.tree_unflatten(problem.shared, problem.structure[2])

    def combine_fn(state: Any, operands: Any) -> tuple[Any, Any]:
        new = step(state, operands, shared)
        return new, new

    return combine_fn


def _stand_ins(problem: _Problem) -> tuple[Any, Any]:
    """What one step is captured with."""
    with torch.inference_mode(False), torch.no_grad():
        states = [torch.zeros_like(one) for one in problem.states]
        operands = [torch.zeros_like(one[0]) for one in problem.operands]
    return tuple(pytree.tree_unflatten(*each) for each in zip((states, operands), problem.structure[:2], strict=True))  # type: ignore[return-value]


class _Call:
    """A call of a captured step, which runs all steps.

    Attributes:
        is_solving: whether there was nothing left to refuse.
        record: of the solve.
    """

    def __init__(self, problem: _Problem) -> None:
        self.problem, self.is_solving = problem, False
        self.record = SolveRecord(getattr(problem.step, "__name__", "step"))

    def __call__(self, framed: Framed, inputs: Sequence[Any]) -> Sequence[Tensor]:
        problem = self.problem
        loop = framed.loop(problem.settings)
        given = problem.states, problem.operands, [inputs[at] for at in framed.shared], problem.length
        if not loop.states:
            raise NotCaptured("it hands on what it is given")
        node = loop.own_node(problem.length)
        self.record = node.record
        plan = loop.plan(*given)
        if problem.start is not None:
            node.record.remember(_start(problem, plan, loop.states))
        self.is_solving = True
        final, outputs = loop.run_at_once(*given, node)
        every = [*final, *outputs]
        return [every[index] for index in framed.results]


# --- a step that is traced at each call ---------------------------------------------------------------------------------


def _traced(problem: _Problem) -> ChainSolution:
    """The solution by a step that is traced now: what transforms look on at, and what Dynamo cannot capture."""
    body, closed_over = _trace_step(problem)
    if closed_over and peek_interpreter_stack() is not None:
        raise UnsupportedError(
            "under a torch.func transform, which would miss them, step may not close over tensors; pass them in shared"
        )
    states, operands, shared = problem.states, problem.operands, [*problem.shared, *closed_over]
    counts = len(states), len(operands), len(shared)
    chain = Chain(body, problem.length, *counts, (), Origin(getattr(problem.step, "__name__", "step")))
    plan = make_plan(chain, signature_of(states, operands, shared), problem.settings)
    node = SolveNode(chain, problem.settings)
    node.learn(plan)
    if problem.start is not None:
        node.record.remember(_start(problem, plan, range(len(states))))
    return problem.solution(node(states, operands, shared), node.record)


def _start(problem: _Problem, plan: Plan, places: Sequence[int]) -> Tensor:
    """A trajectory given by the user as `[L, *batch, d]`.

    Args:
        places: those states that the blocks change.
    """
    parts, spec = pytree.tree_flatten(problem.start)
    expected = [(problem.length, *state.shape) for state in problem.states]
    got = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
    if spec != problem.structure[0] or got != expected:
        raise UnsupportedError(f"start must be a trajectory with the shapes {expected}, in the form of x0, got {got}")
    layout, dtype = plan.program.layout, plan.program.dtype
    moved = [
        (to_real(part) if part.is_complex() else part).detach().to(dtype) for part in map(parts.__getitem__, places)
    ]
    return torch.stack([layout.flatten([part[index] for part in moved]) for index in range(problem.length)])


def _check(states: list[Any], every: list[Any], common: list[Any]) -> None:
    if not states:
        raise UnsupportedError("x0 holds no tensor; a state is a floating tensor or a pytree of them")
    for name, group in (("x0", states), ("operands", every), ("shared", common)):
        for value in group:
            if not isinstance(value, Tensor):
                raise UnsupportedError(f"{name} must be tensors, got {type(value).__name__}")
    for state in states:
        if not (state.is_floating_point() or state.is_complex()):
            raise UnsupportedError(f"a state must have a floating dtype, or a complex one, got {state.dtype}")


def _length(every: list[Tensor], length: int | None) -> int:
    if length is not None and (isinstance(length, bool) or not isinstance(length, int)):
        raise UnsupportedError(f"length must be a whole number, got {length!r}")
    sizes = {operand.shape[0] if operand.ndim else None for operand in every}
    if None in sizes:
        raise UnsupportedError("operands are stacked along dimension 0, got a tensor without dimensions")
    if length is not None:
        sizes.add(length)
    if len(sizes) != 1:
        got = ", ".join(map(str, sorted(sizes))) or "no operands and no length"  # type: ignore[type-var]
        raise UnsupportedError(f"operands and length must agree on one L, got {got}")
    found = sizes.pop()
    if not isinstance(found, int) or found < 1:
        raise UnsupportedError(f"a chain has at least 1 block, got length {found}")
    return found


@isolated
def _trace_step(problem: _Problem) -> tuple[fx.GraphModule, list[Tensor]]:
    """`step` as a graph over tensors, and the tensors that it closes over."""
    states, operands, shared = problem.states, [operand[0] for operand in problem.operands], problem.shared
    counts = len(states), len(states) + len(operands)

    def flat(*tensors: Tensor) -> tuple[Any, ...]:
        groups = tensors[: counts[0]], tensors[counts[0] : counts[1]], tensors[counts[1] :]
        arguments = (pytree.tree_unflatten(list(g), s) for g, s in zip(groups, problem.structure, strict=True))
        result, spec = pytree.tree_flatten(problem.step(*arguments))
        problem.check_structure(spec)
        for value in result:
            if not isinstance(value, Tensor):
                raise UnsupportedError(f"step must return tensors, got {type(value).__name__}")
        return tuple(result)

    inputs = [_stand_in(tensor) for tensor in (*states, *operands, *shared)]
    try:
        # Attention in ordinary ops: its fused kernels cannot be traced for many blocks at once.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            graph = make_fx(flat)(*inputs)
    except UnsupportedError:
        raise
    except Exception as error:
        raise BodyError(f"step cannot be traced: {error}") from error
    return graph, _lift_constants(graph)


def _stand_in(tensor: Tensor) -> Tensor:
    """What `step` is traced with: a distinct tensor, since one object given twice would be traced as one input."""
    if is_functorch_wrapped_tensor(tensor):  # its values only exist within its transform
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.detach().clone()


def _lift_constants(module: fx.GraphModule) -> list[Tensor]:
    """Make tensors that the graph holds inputs of it, so that gradients reach them."""
    lifted: dict[str, fx.Node] = {}
    values = []
    last = [node for node in module.graph.nodes if node.op == "placeholder"][-1]
    for node in list(module.graph.nodes):
        if node.op != "get_attr":
            continue
        name = str(node.target)
        if not isinstance(getattr(module, name), Tensor):
            raise BodyError("step holds a graph of its own, as torch.cond makes; such a step cannot be traced")
        if name not in lifted:
            with module.graph.inserting_after(last):
                last = lifted[name] = module.graph.placeholder(f"closed_over_{len(lifted)}")
            values.append(getattr(module, name))
        node.replace_all_uses_with(lifted[name])
        module.graph.erase_node(node)
    module.recompile()
    return values
