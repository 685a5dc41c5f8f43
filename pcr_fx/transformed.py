"""A chain under a function transform is the chain of its transformed blocks.

Tangents are carried from block to block beside the states, and so is a further batch: `jvp` and `vmap` of a chain are chains,
which have plans and kernels like any other. Where such a chain cannot be planned, its blocks run one by one.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from pcr_fx.body import Signature
from pcr_fx.body.isolation import isolated
from pcr_fx.body.written_out import write_out_fused
from pcr_fx.chain import Chain, TensorSpec
from pcr_fx.errors import BodyError
from pcr_fx.graphs.parts import holds_derivatives
from pcr_fx.planner import Plan, make_plan
from pcr_fx.record import record_of
from pcr_fx.unrolled import pushforward, second_order_fault

log = logging.getLogger(__name__)

# Of one plan: several transforms, of several sizes each.
_KEPT = 32

# By what is transformed; a plan that cannot be made is not tried again.
_made: weakref.WeakKeyDictionary[Plan, dict[Hashable, Plan | None]] = weakref.WeakKeyDictionary()
_all: weakref.WeakSet[Plan] = weakref.WeakSet()


def is_of_transformed_blocks(plan: Plan) -> bool:
    """Whether it is of a chain of transformed blocks, whose derivatives are such chains in turn."""
    return plan in _all


class Inputs(NamedTuple):
    """What blocks are called with: states, operands `[L, ...]` and shared operands."""

    states: Sequence[Tensor]
    operands: Sequence[Tensor]
    shared: Sequence[Tensor]

    @property
    def signature(self) -> Signature:
        """The tensors of one block."""
        each = [_spec(one, one.shape[1:]) for one in self.operands]
        return Signature(tuple(map(_spec, self.states)), tuple(each), tuple(map(_spec, self.shared)))


def find(plan: Plan, key: Hashable, chain_for: Callable[[Signature], Chain], inputs: Inputs) -> Plan | None:
    """The chain of transformed blocks for such tensors; nothing where there is none."""
    signature = inputs.signature
    known = _made.setdefault(plan, {})
    if (key, signature) not in known:
        known[key, signature] = _planned(plan, chain_for, signature)
        if len(known) > _KEPT:
            known.pop(next(iter(list(known))), None)  # other threads may be at it, too
    return known[key, signature]


def _planned(plan: Plan, chain_for: Callable[[Signature], Chain], signature: Signature) -> Plan | None:
    before = plan.program.chain
    name = before.origin.modules or "a chain"
    if holds_derivatives(before.body.graph):  # what a function brings with it is for cotangents alone
        return None
    try:
        made = make_plan(isolated(chain_for)(signature), signature, plan.options)
    except BodyError as reason:
        log.info("%s runs block by block under a function transform: %s", name, reason)
        return None
    _all.add(made.origin or made)  # which is the one that operators find
    return made


def named(plan: Plan, record: int, device: torch.device) -> tuple[str, int]:
    """What operators call a plan and a record by."""
    record_of(record).prepare(plan, device)
    return plan.key, record


def _spec(tensor: Tensor, shape: Sequence[int] | None = None) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape if shape is None else shape), tensor.dtype, tensor.device)


def of_tangents(chain: Chain, operands: Sequence[bool], shared: Sequence[bool], signature: Signature) -> Chain:
    """The chain of states and their tangents, called with those operands and then the tangents of some.

    Args:
        operands, shared: which have tangents.
        signature: of its tensors.

    Raises:
        BodyError: PyTorch's derivatives of the block are not those of one function.
    """
    count, numbers, body = chain.num_states, len(chain.literals), write_out_fused(chain.body, any_derivative=True)
    sizes = count, count, len(operands), sum(operands), numbers, len(shared), sum(shared)

    def parted(given: Sequence[Any]) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor], list[Tensor]]:
        """A block as a function of all that moves, that, and its tangents."""
        states, d_states, each, d_each, literals, common, d_common = _parts(given, sizes)

        def block(*moving: Tensor) -> tuple[Tensor, ...]:
            waiting = iter(moving)
            new = list(islice(waiting, count))
            now = [next(waiting) if moves else one for one, moves in zip(each, operands, strict=True)]
            of_all = [next(waiting) if moves else one for one, moves in zip(common, shared, strict=True)]
            return tuple(body.forward(*new, *now, *literals, *of_all)[:count])

        return block, [*states, *chosen(each, operands), *chosen(common, shared)], [*d_states, *d_each, *d_common]

    def tangents_of_a_block(*given: Any) -> tuple[Tensor, ...]:
        new, tangents = pushforward(*parted(given))
        return *new, *tangents

    literals = [values[0] for values in chain.literals]
    drawn = [*map(_drawn, (*signature.states, *signature.operands)), *literals, *map(_drawn, signature.shared)]
    if fault := second_order_fault(*parted(drawn)):
        raise BodyError(fault)
    of_both = _body(tangents_of_a_block, sum(sizes))
    return _with_body(chain, of_both, 2 * count, len(operands) + sum(operands), len(shared) + sum(shared))


def _drawn(spec: TensorSpec) -> Tensor:
    """Numbers of any kind, in order to have none twice."""
    if not spec.is_differentiable:
        return torch.zeros(spec.shape, dtype=spec.dtype, device=spec.device)
    count = math.prod(spec.shape)
    numbers = torch.sin(torch.arange(1, count + 1, dtype=torch.float64) * 12.9898) * 0.9
    return numbers.reshape(spec.shape).to(spec.dtype).to(spec.device)


def of_batches(chain: Chain, operands: Sequence[bool], shared: Sequence[bool], signature: Signature) -> Chain:
    """The chain of many states at once, `[N, ...]`.

    Args:
        operands, shared: of which there are as many, `[L, N, ...]` and `[N, ...]`; the others are common to all.
        signature: of its tensors, whatever these are.
    """
    count, body = chain.num_states, write_out_fused(chain.body)
    dims = [0 if many else None for many in (*operands, *(False for _ in chain.literals), *shared)]

    def many_blocks(*given: Any) -> tuple[Tensor, ...]:
        return torch.vmap(lambda *one: tuple(body.forward(*one)[:count]), (*(0,) * count, *dims))(*given)

    return _with_body(chain, _body(many_blocks, count + len(dims)), count, len(operands), len(shared))


def _with_body(chain: Chain, body: fx.GraphModule, states: int, operands: int, shared: int) -> Chain:
    """The chain of other blocks in its place, of whose outputs nothing is known."""
    return Chain(body, chain.length, states, operands, shared, chain.literals, chain.origin)


def _body(function: Callable[..., Any], count: int) -> fx.GraphModule:
    """A body that calls a function of so many inputs."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"given_{index}") for index in range(count)]
    graph.output(graph.call_function(function, tuple(inputs)))
    return fx.GraphModule(nn.Module(), graph)


def _parts(given: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    waiting = iter(given)
    return [list(islice(waiting, size)) for size in sizes]


def split(num_operands: int) -> tuple[slice, slice]:
    """Where operands and where shared operands stand among both."""
    return slice(num_operands), slice(num_operands, None)


def present(every: Sequence[Tensor | None]) -> list[Tensor]:
    """Those that there are."""
    return [one for one in every if one is not None]


def chosen(every: Sequence[Any], which: Sequence[bool]) -> list[Any]:
    """Those that are marked."""
    return [one for one, is_chosen in zip(every, which, strict=True) if is_chosen]
