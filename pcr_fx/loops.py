"""A loop whose step is a graph: the chain of its carries, for any number of steps.

Nothing is traced or compiled for another length: the chain is given its length anew, with the plan, the kernel and what
was measured of it, and the solve node around that is small.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from pcr_fx.body import Signature
from pcr_fx.body.isolation import is_traced_or_transformed
from pcr_fx.body.reals import carry_reals
from pcr_fx.carried import carry
from pcr_fx.chain import Chain, Complex, Head, Leaving, Origin, Place
from pcr_fx.errors import BodyError, TextError
from pcr_fx.graphs.nodes import op_name
from pcr_fx.looks import signature_of
from pcr_fx.loop_step import Step, check_open, is_complex, needed_for, part_of, switches_gradients_on, value_of
from pcr_fx.node import Family, SolveNode
from pcr_fx.operands import Given, complex_of_parts, parts_of_complex
from pcr_fx.options import Options
from pcr_fx.planner import Plan, make_plan
from pcr_fx.ways.memory import memory_limit

log = logging.getLogger(__name__)

# Lengths that a solve node is kept for.
_LENGTHS = 256
# Bytes of states that are kept without a look at how much memory is free.
_FEW_BYTES = 2**26


@dataclass(frozen=True)
class _Taken:
    """What an output is among all that there is of a loop.

    Attributes:
        kind: "state" after each step or "before" it, "output" of the chain, "x" as it was given, or "shared" by all steps.
        number: which of these.
    """

    kind: str
    number: int


class Loop:
    """A step for any number of steps.

    Args:
        step: in its normal form.
        options: how its chain is solved.

    Attributes:
        chain: of as many steps as it was first called for; `None` where the step hands nothing on.
        node: of the latest call.
    """

    def __init__(self, step: Step, options: Options) -> None:
        self.step, self.options = step, options
        results, inputs = step.results, step.inputs
        carry = inputs[: step.num_carry]
        # What each step hands on as it got it is the same for all.
        self.states: list[int] = [index for index in range(step.num_carry) if results[index] is not carry[index]]
        self.fixed = [index for index in range(step.num_carry) if index not in self.states]
        self.common = [*inputs[step.num_carry + step.num_xs :], *(carry[i] for i in self.fixed)]
        self.taken: list[_Taken] = []
        self.specs = [value_of(result) for result in results]
        self.node: SolveNode | None = None
        self._nodes: dict[tuple[int, bool], SolveNode] = {}
        self._family = Family(self._plan)
        self._plans: dict[Signature, Plan | BodyError] = {}
        self._divide()

    # --- the step as the block of a chain, and what it gives away -------------------------------------------------

    def _divide(self) -> None:
        """Find what of the step is the chain's body, and what its head."""
        step, inputs, results = self.step, self.step.inputs, self.step.results
        new = [results[index] for index in self.states]
        old = [inputs[index] for index in self.states]
        xs = inputs[step.num_carry : step.num_carry + step.num_xs]
        outputs: list[fx.Node] = []
        for result in results[step.num_carry :]:
            if result in xs:
                self.taken.append(_Taken("x", xs.index(result)))
            elif result in self.common:
                self.taken.append(_Taken("shared", self.common.index(result)))
            elif result in new and result.op != "placeholder":
                self.taken.append(_Taken("state", new.index(result)))
            elif result in old:
                self.taken.append(_Taken("before", old.index(result)))
            else:
                if result not in outputs:
                    outputs.append(result)
                self.taken.append(_Taken("output", outputs.index(result)))
        own = needed_for(step.graph.graph, new)
        self.xs = [index for index, node in enumerate(xs) if node in own]
        self.shared = [index for index, node in enumerate(self.common) if node in own]
        made = [node for node in new if node.op != "placeholder"]
        beside = needed_for(step.graph.graph, outputs, made)
        self.head_xs = [index for index, node in enumerate(xs) if outputs and node in beside]
        self.head_shared = [index for index, node in enumerate(self.common) if outputs and node in beside]
        operands, shared = [xs[i] for i in self.xs], [self.common[i] for i in self.shared]
        more = [xs[i] for i in self.head_xs], [self.common[i] for i in self.head_shared]
        body = part_of(step.graph, [*old, *operands, *shared], new)
        head = None
        if outputs:
            after = [node if node in made else None for node in new]
            alone = part_of(step.graph, [*old, *after, *more[0], *more[1]], outputs)
            every = [*old, *operands, *shared, *more[0], *more[1]]
            block = part_of(step.graph, every, [*new, *outputs])
            head = Head(alone, block, len(outputs), len(more[0]), len(more[1]))
        ops = tuple(op_name(node) for node in step.graph.graph.nodes if node.op not in ("placeholder", "output"))
        self.chain = Chain(
            body,
            1,
            len(new),
            len(operands),
            len(shared),
            origin=Origin(f"{step.name} (a loop)", step.source, ops),
            head=head,
        )
        which = Complex(*(tuple(map(is_complex, nodes)) for nodes in (new, operands, shared, *more, outputs)))
        if which:
            self.chain = carry_reals(self.chain, which)
        wanted = {one.number for one in self.taken if one.kind in ("state", "before")}
        self.whole = (*sorted(wanted), *(len(new) + index for index in range(len(outputs))))

    # --- calls ----------------------------------------------------------------------------------------------------

    def run(
        self, init: Sequence[Tensor], xs: Sequence[Tensor], shared: Sequence[Tensor], length: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The carry after all steps, and every output of all steps, `[length, ...]`.

        Args:
            init: the carry before them.
            xs: `[length, ...]`.
            shared: what the step gets whole each time.
        """
        every = self._steps_between_checkpoints((*init, *xs, *shared), init, length)
        if every >= length:
            return self.run_at_once(init, xs, shared, length)
        # Split, and not sliced: the gradient of a slice is as large as all of it.
        parts = [x.split(every) for x in xs]
        carry, pieces = list(init), []
        for first in range(0, length, every):
            count = min(every, length - first)
            given = carry, [part[first // every] for part in parts], shared, count
            if first + count < length:
                carry, outputs = checkpoint(self.run_at_once, *given, use_reentrant=False)
            else:  # where the backward begins
                carry, outputs = self.run_at_once(*given)
            pieces.append(outputs)
        return carry, [torch.cat(each) for each in zip(*pieces, strict=True)]

    def _steps_between_checkpoints(self, given: Sequence[Tensor], init: Sequence[Tensor], length: int) -> int:
        """After how many steps a carry is kept for a backward that computes those between anew; `length` where all are."""
        has_backward = torch.is_grad_enabled() and any(one.requires_grad for one in given)
        if not (self.states and has_backward) or is_traced_or_transformed():
            return length
        if self.options.checkpoint is not None:
            return self.options.checkpoint
        kept, limit = length * sum(init[index].nbytes for index in self.states), self.options.memory_limit
        if kept <= (_FEW_BYTES if limit is None else limit) or kept <= memory_limit(limit, init[0].device):
            return length
        return math.isqrt(length - 1) + 1

    def run_at_once(
        self,
        init: Sequence[Tensor],
        xs: Sequence[Tensor],
        shared: Sequence[Tensor],
        length: int,
        node: SolveNode | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """`run` without checkpoints.

        Args:
            node: from `own_node`, in place of the one that all such calls share.
        """
        common = [*shared, *(init[index] for index in self.fixed)]
        states = [init[index] for index in self.states]
        if not length:
            return list(init), self._nothing()
        whole: dict[int, Tensor] = {}
        final = list(init)
        if self.states:
            given = Given(
                states,
                [xs[index] for index in self.xs],
                [common[index] for index in self.shared],
                [xs[index] for index in self.head_xs],
                [common[index] for index in self.head_shared],
            )
            leaves = self._solved(given, length, node)
            for index, parts in zip(self.whole, leaves, strict=False):
                whole[index] = torch.stack(parts) if isinstance(parts, list) else parts
            for index, state in zip(self.states, leaves[len(self.whole) :], strict=True):
                final[index] = state
        elif any(one.kind == "output" for one in self.taken):
            whole = self._each(xs, common, length)
        return final, self._outputs(states, xs, common, whole, length)

    def _solved(self, given: Given, length: int, node: SolveNode | None) -> Sequence[Any]:
        """What leaves the chain, which takes and returns complex tensors by their real and imaginary parts."""
        if self.chain.as_written is None:
            return self._by_node(given, length, node)
        which = self.chain.as_written[1]
        returned = (*which.states, *which.outputs)
        leaving = [*self.whole, *range(len(self.states))]
        pairs = zip(self._by_node(Given(*self._by_parts(*given)), length, node), leaving, strict=True)
        return [complex_of_parts(one) if returned[index] else one for one, index in pairs]

    def _by_node(self, given: Given, length: int, node: SolveNode | None) -> Sequence[Any]:
        """What leaves the chain as it is solved."""
        leaves = self._carried(given) if torch.compiler.is_exporting() else None
        if leaves is None:
            self.node = node or self._node(int(length))
            return self.node(*given)  # type: ignore[no-any-return]
        return leaves

    def _carried(self, given: Given) -> Sequence[Any] | None:
        """What leaves the chain for an exporter, with a length that is the size of its operands; nothing where there are none."""
        if not given.operands and not given.head_operands:
            return None
        taps = tuple((index, -1) for index in range(len(self.states)))
        chain = self.chain if self.chain.length == 1 else self.chain.of_length(1)
        try:
            check_open(self.step.graph.graph)
            return carry(chain, Leaving(taps, self.whole), self.options, given, is_open=True)
        except (BodyError, TextError) as reason:
            log.info("%s is exported step by step: %s", self.step.name, reason)
            return None

    def _by_parts(self, *given: Sequence[Any]) -> list[list[Any]]:
        """States, operands, shared operands and those of the head with parts in place of complex tensors."""
        if self.chain.as_written is None:
            return [list(tensors) for tensors in given]
        which = self.chain.as_written[1]
        marks = which.states, which.operands, which.shared, which.head_operands, which.head_shared
        return [
            [parts_of_complex(one) if is_complex else one for one, is_complex in zip(tensors, each, strict=True)]
            for tensors, each in zip(given, marks, strict=False)
        ]

    def _outputs(
        self,
        states: Sequence[Tensor],
        xs: Sequence[Tensor],
        common: Sequence[Tensor],
        whole: dict[int, Tensor],
        length: int,
    ) -> list[Tensor]:
        outputs, given = [], set[int]()
        for one in self.taken:
            if one.kind == "x":
                outputs.append(xs[one.number].clone(memory_format=torch.contiguous_format))
            elif one.kind == "shared":
                same = common[one.number]
                outputs.append(same.expand(length, *same.shape).clone(memory_format=torch.contiguous_format))
            elif one.kind == "before":
                outputs.append(torch.cat([states[one.number].unsqueeze(0), whole[one.number][:-1]]))
            else:
                number = one.number if one.kind == "state" else len(self.states) + one.number
                outputs.append(whole[number].clone() if number in given else whole[number])
                given.add(number)
        return outputs

    def _each(self, xs: Sequence[Tensor], common: Sequence[Tensor], length: int) -> dict[int, Tensor]:
        """The outputs of a step that hands nothing on, step by step."""
        head = self.chain.head
        assert head is not None, "there is something to compute"
        shared = [common[index] for index in self.head_shared]
        found = [head.body.forward(*(xs[i][index] for i in self.head_xs), *shared) for index in range(length)]
        return {index: torch.stack(parts) for index, parts in enumerate(zip(*found, strict=True))}

    def _nothing(self) -> list[Tensor]:
        """The outputs of no steps."""
        specs = self.specs[self.step.num_carry :]
        return [torch.empty((0, *spec.shape), dtype=spec.dtype, device=spec.device) for spec in specs]

    def expected_node(self, length: int) -> SolveNode | None:
        """The solve node of calls with so many steps, which are still to come."""
        if self.states:
            self.node = self._node(length)
        return self.node

    def _node(self, length: int) -> SolveNode:
        """The solve node for so many steps."""
        keeps = torch.is_grad_enabled()
        node = self._nodes.get((length, keeps))
        if node is None:
            if self.chain.length == 1:
                self.chain = self.chain.of_length(max(length, 2))
            states = len(self.states)
            taps = tuple((index, length - 1) for index in range(states))
            # What is kept for a backward is not what the caller gets, who may write to that.
            places = tuple(Place(0) if keeps and index < states else None for index in self.whole)
            leaving = Leaving(taps, self.whole, places)
            node = SolveNode(self.chain.of_length(length), self.options, leaving=leaving, family=self._family)
            self._nodes[length, keeps] = node
            if len(self._nodes) > _LENGTHS:
                self._nodes.pop(next(iter(list(self._nodes))), None)  # other threads may be at it, too
        return node

    def own_node(self, length: int) -> SolveNode:
        """The solve node for so many steps, with a record that nobody else's calls are in."""
        return self._node(length).with_own_record()

    def plan(self, init: Sequence[Tensor], xs: Sequence[Tensor], shared: Sequence[Tensor], length: int) -> Plan:
        """The plan of a loop over such tensors.

        Raises:
            BodyError: it cannot be solved as a chain.
        """
        common = [*shared, *(init[index] for index in self.fixed)]
        states, operands = [init[index] for index in self.states], [xs[index] for index in self.xs]
        given = self._by_parts(states, operands, [common[index] for index in self.shared])
        signature = signature_of(*given)
        return self._plan(self.chain.of_length(length), signature, self.options)

    def _plan(self, chain: Chain, signature: Signature, options: Options) -> Plan:
        """That of the first length, for another."""
        if not torch.is_grad_enabled() and any(map(switches_gradients_on, self.step.graph.graph.nodes)):
            raise BodyError("a step switches gradients on where they are off")
        known = self._plans.get(signature)
        if known is None:
            try:
                check_open(self.step.graph.graph)
                known = make_plan(self.chain, signature, options)
            except BodyError as reason:
                known = reason
            self._plans[signature] = known
            if len(self._plans) > _LENGTHS:
                self._plans.pop(next(iter(list(self._plans))), None)
        if isinstance(known, BodyError):
            raise known
        return known.for_chain(chain)
