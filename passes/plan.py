"""Plan each chain that was found: check its body, and choose what will run it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from pcr_fx.body import Signature
from pcr_fx.body.isolation import is_transformed, wants_every_op
from pcr_fx.body.reals import to_real
from pcr_fx.chain import NearMiss, TensorSpec
from pcr_fx.errors import BodyError
from pcr_fx.looks import refuse_unusual, solved_dtype
from pcr_fx.node import SolveNode
from pcr_fx.options import Options
from pcr_fx.passes.assembly import FoundChain
from pcr_fx.passes.detect import Detection
from pcr_fx.passes.rewrite import explain_unsortable, sortable_chains
from pcr_fx.planner import Choice, Plan, make_plan


@dataclass(frozen=True, eq=False)
class PlannedChain:
    """A chain with its plan.

    Attributes:
        found: the chain, and where it is tied into the graph.
        plan, choice: how it is to run; `None` while its shapes are not known yet.
        refusal: why the present tensors are left to the model's own ops, if they are; others may come.
        node: what is to stand for it in the graph; `None` where the model's own ops stay.
        parameters: the names of the blocks' own parameters.
    """

    found: FoundChain
    plan: Plan | None
    choice: Choice | None
    refusal: BodyError | None = None
    node: SolveNode | None = None
    parameters: frozenset[str] = frozenset()

    def left_alone(self, needs_gradient: bool) -> bool:
        """Whether the rest of the compiler does as well or better: block by block, and nobody asked for it."""
        return self.refusal is not None or (self.choice is not None and self.choice.leaves_alone(needs_gradient))


def plan_chains(
    graph: fx.Graph, detection: Detection, attributes: dict[str, Any], options: Options
) -> tuple[list[PlannedChain], list[NearMiss]]:
    """Plans for the chains found; those that cannot be solved as a whole are near misses, with the reason."""
    planned, near_misses = [], list(detection.near_misses)
    sortable = sortable_chains(graph, detection.chains)
    for found in detection.chains:
        try:
            if found not in sortable:
                raise BodyError(explain_unsortable(graph, found))
            made = _plan_chain(found, attributes, options)
            planned.append(replace(made, parameters=_parameters(found, attributes)))
        except BodyError as reason:
            origin = found.chain.origin
            near_misses.append(NearMiss(origin.modules, str(reason), found.chain.length, origin.source))
    return planned, near_misses


def _plan_chain(found: FoundChain, attributes: dict[str, Any], options: Options) -> PlannedChain:
    groups = [
        [_value(node, attributes) for node in nodes]
        for nodes in (found.initial, [operand[0] for operand in found.operands], found.shared)
    ]
    given = (*found.initial, *itertools.chain.from_iterable(found.operands), *found.shared)
    refusal = refuse_unusual([_value(node, attributes) for node in given])
    if refusal is not None:
        return PlannedChain(found, None, None, refusal)
    if any(value is None or value.device.type == "meta" for group in groups for value in group):
        return PlannedChain(found, None, None)
    signature = Signature(*(tuple(_spec(value) for value in group) for group in groups))
    plan = make_plan(found.chain, signature, options)
    _fix_other_sizes(groups, plan)
    layout = plan.program.layout
    samples = math.prod(signature.states[0].shape[dim] for dim in layout.batch_dims)
    return PlannedChain(found, plan, plan.choice(samples))


def _parameters(found: FoundChain, attributes: dict[str, Any]) -> frozenset[str]:
    values = {node: _value(node, attributes) for node in itertools.chain.from_iterable(found.operands)}
    return frozenset(
        str(node.target) for node, value in values.items() if isinstance(value, nn.Parameter) and value.requires_grad
    )


def measure_chains(planned: Sequence[PlannedChain], values: dict[fx.Node, torch.Tensor]) -> list[PlannedChain]:
    """Choose by measurement where that is wanted: on the tensors there are, and others of their shapes.

    Args:
        values: the real inputs of the graph.
    """
    if is_transformed() or wants_every_op():
        return list(planned)  # there are no numbers here, or every chain will run as the model wrote it
    return [item if item.plan is None else _measured(item, item.plan, values) for item in planned]


def _measured(item: PlannedChain, plan: Plan, values: dict[fx.Node, torch.Tensor]) -> PlannedChain:
    found, signature, needs_gradient = item.found, plan.program.signature, torch.is_grad_enabled()
    states = [_stand_in(n, s, values) for n, s in zip(found.initial, signature.states, strict=True)]
    initial = plan.program.layout.flatten(states)
    if not plan.wants_measuring(plan.samples(initial), needs_gradient):
        return item
    pairs = zip(found.operands, signature.operands, strict=True)
    operands = [torch.stack([_stand_in(node, spec, values) for node in operand]) for operand, spec in pairs]
    shared = [_stand_in(n, s, values) for n, s in zip(found.shared, signature.shared, strict=True)]
    call = plan.program.call_with(initial, operands, shared)
    wanted = [any(map(_requires_grad, nodes)) for nodes in (*found.operands, *((node,) for node in found.shared))]
    return replace(item, choice=plan.measure(call, needs_gradient, are_stacked=bool(operands), wanted=wanted))


def _stand_in(node: fx.Node, spec: TensorSpec, values: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    """The node's value where it is an input, else random numbers, or zeros, of its shape."""
    if node in values:
        value = values[node].detach()
        return to_real(value) if value.is_complex() else value.to(spec.dtype)
    if not spec.dtype.is_floating_point:
        return torch.zeros(spec.shape, dtype=spec.dtype, device=spec.device)
    generator = torch.Generator(spec.device).manual_seed(0)
    return torch.randn(spec.shape, dtype=spec.dtype, device=spec.device, generator=generator)


def _value(node: fx.Node, attributes: dict[str, Any]) -> Any:
    if node.op == "get_attr" and str(node.target) in attributes:
        return attributes[str(node.target)]
    return node.meta.get("example_value")


def _requires_grad(node: fx.Node) -> bool:
    """Whether it has a gradient when the graph runs, as far as that is known."""
    return getattr(node.meta.get("example_value"), "requires_grad", True)


def _spec(value: torch.Tensor) -> TensorSpec:
    spec = TensorSpec.of(value)
    sizes = []
    for size in spec.shape:
        hint = size.node.hint if isinstance(size, torch.SymInt) else size
        if hint is None:
            raise BodyError(f"the size {size} of an operand depends on data")
        sizes.append(int(hint))
    if spec.dtype.is_complex:  # its real and imaginary parts
        return replace(spec, shape=(*sizes, 2), dtype=spec.dtype.to_real())
    return replace(spec, shape=tuple(sizes), dtype=solved_dtype(spec.dtype))


def _fix_other_sizes(groups: Sequence[Sequence[torch.Tensor]], plan: Plan) -> None:
    """Tell a compiler that traces with symbolic sizes which of them this plan holds for as they are.

    Taking the value of a symbolic size makes the compiler guard it: another size then compiles anew.
    """
    program, count = plan.program, plan.free_batch_dims
    free = [list(program.layout.batch_dims[:count]) for _ in groups[0]]
    free += [[dim for dim, number in pairs if number < count] for pairs in program.generality.follows]
    for value, dims in zip([value for group in groups for value in group], free, strict=True):
        for dim, size in enumerate(value.shape):
            if dim not in dims:
                int(size)
