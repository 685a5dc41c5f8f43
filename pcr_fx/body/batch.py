"""Which dimensions of a body's states are batch dimensions: a proof by abstract interpretation.

Dimension b is a *batch dimension* when every new state at index i along b depends on the states at index i only.
The Jacobian is computed with cotangents that are broadcast along the batch dimensions, so a wrong claim would
be a wrong number: the proof is conservative, and an op without a rule couples everything.

Each candidate dimension gets a *label*; each tensor that depends on the states has a *layout*: per dimension,
the ordered factors that it is made of, so that a view [B, T, w] -> [B * T, w] and back keeps B and T apart.
The invariant: such a tensor carries each live label exactly once, and what it holds at an index along the
label depends on the states at this index only. A rule lays the operands of an op out over the dimensions of
its result. A label that one operand then lacks, or has elsewhere than another, is lost: the op couples it.

Writes in place need no alias analysis: an elementwise write into a tensor that has a layout, with all its
operands in agreement, leaves the invariant true for every view of that memory. Any other write of states
couples everything.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from pcr_fx.body.batch_layouts import Factor, Layout, fit, places
from pcr_fx.body.batch_rules import POINTWISE, SHAPE_ONLY, OpCall, Rule, rule_of
from pcr_fx.graphs.effects import is_random
from pcr_fx.graphs.nodes import (
    arguments_of,
    aten_name,
    declared_writes,
    is_mutable,
    nodes_in,
    qualified_name,
    shape_of,
)


@dataclass(frozen=True)
class BatchDimensions:
    """The batch dimensions of a body.

    Attributes:
        dims: the dimensions proved, ascending; the same positions in every state.
        reasons: for each other dimension of the first state, what couples it, as in "aten.mm contracts it".
        outputs: for each result behind the new states, in which dimension it has each of `dims`; `None` where it lacks one.
        most: how many were kept at most; `None` for all that were proved.
    """

    dims: tuple[int, ...]
    reasons: Mapping[int, str] = field(default_factory=dict, hash=False)
    outputs: tuple[tuple[int, ...] | None, ...] = ()
    most: int | None = None

    def leading(self, most: int | None) -> BatchDimensions:
        """So many of the first ones alone; the others tell no samples apart."""
        if most is None:
            return self
        reasons = {**self.reasons, **dict.fromkeys(self.dims[most:], "its size is fixed")}
        outputs = tuple(None if found is None else found[:most] for found in self.outputs)
        return BatchDimensions(self.dims[:most], reasons, outputs, most)


def prove_batch_dimensions(
    body: fx.GraphModule, num_states: int, followers: Mapping[int, Sequence[int]] | None = None
) -> BatchDimensions:
    """The dimensions along which `body` provably acts independently.

    Candidates are the positions that exist, with one size, in every state. The proof reads the ops, not the
    sizes: a dimension of size 1 is claimed only if, as far as a graph traced at size 1 tells, the ops would
    keep it apart at any size.

    Args:
        body: aten graph `(*states, *others) -> (*new_states, *outputs)`, with static shapes, and with `meta["val"]` on
            its inputs and ops, as `make_fx` leaves them.
        num_states: how many of the first inputs are states.
        followers: inputs that are supposed to have a part for each sample, by position: for their first dimensions the
            dimensions of the states that they follow. A dimension is then proved only if it is for those inputs too.

    Raises:
        ValueError: `body` is not such a graph, or has fewer inputs than `num_states`.
    """
    states, new_states, outputs = _states_and_results(body, num_states)
    shapes = [shape_of(state) for state in states]
    proof = _Proof(range(len(shapes[0])))
    for dim, size in enumerate(shapes[0]):
        if any(0 in shape for shape in shapes):
            proof.lose(dim, "the states have no elements")
        elif any(shape[dim : dim + 1] != (size,) for shape in shapes):
            proof.lose(dim, "the states differ in size there")
    for state, shape in zip(states, shapes, strict=True):
        proof.layouts[state] = tuple((Factor(dim, size),) for dim, size in enumerate(shape))
    inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
    for position, labels in (followers or {}).items():
        shape = shape_of(inputs[position])
        named = [*labels, *(None for _ in shape[len(labels) :])]
        proof.layouts[inputs[position]] = tuple((Factor(*pair),) for pair in zip(named, shape, strict=True))
    needed = _needed_nodes(body.graph)
    for node in body.graph.nodes:
        # Once nothing lives, nothing can be learnt, and numbers taken out of tensors need no layouts.
        if proof.live and node in needed and node.op not in ("placeholder", "output"):
            proof.visit(node)
    proof.check_new_states(new_states)
    dims = tuple(sorted(proof.live))
    sizes = [shapes[0][dim] for dim in dims]
    return BatchDimensions(
        dims, dict(sorted(proof.reasons.items())), tuple(proof.places_in(output, dims, sizes) for output in outputs)
    )


class _Proof:
    """The interpretation of one body.

    Attributes:
        live: the labels not lost.
        reasons: why the others were.
        layouts: of each tensor that depends on the states.
        several: ops that depend on the states and have several results, whose layouts their getitems have.
    """

    def __init__(self, labels: Collection[int]) -> None:
        self.live = set(labels)
        self.reasons: dict[int, str] = {}
        self.layouts: dict[fx.Node, Layout] = {}
        self.several: set[fx.Node] = set()

    def lose(self, label: int, reason: str) -> None:
        if label in self.live:
            self.live.remove(label)
            self.reasons[label] = reason

    def lose_all(self, reason: str) -> None:
        for label in sorted(self.live):
            self.lose(label, reason)

    def visit(self, node: fx.Node) -> None:
        """Interpret one node; those before it have been."""
        if is_random(node):
            self.lose_all(f"{qualified_name(node)} draws random numbers")
        if not any(source in self.layouts or source in self.several for source in node.all_input_nodes):
            return
        if (aten_name(node) or "").startswith(SHAPE_ONLY):
            return
        if self._writes_elsewhere(node):
            self.lose_all(f"{qualified_name(node)} has no dimension rule for what it writes")
        if node.target is operator.getitem and node.args[0] in self.several:
            self._infer(node.args[0], node, node.args[1])  # type: ignore[arg-type]
        elif isinstance(node.meta["val"], tuple | list):
            self.several.add(node)
        else:
            self._infer(node, node, 0)

    def check_new_states(self, new_states: Sequence[fx.Node]) -> None:
        """A label lives only if each new state that depends on the states has it as its own dimension."""
        for state in new_states:
            found = places(self.layouts.get(state, ()))
            for label in sorted(self.live if state in self.layouts else ()):
                if found[label] != (label, 1):
                    self.lose(label, "the new state has it in another dimension")

    def places_in(self, output: fx.Node, labels: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...] | None:
        """The dimension of an output that each label is, of its size; `None` where one is none."""
        found, shape = places(self.layouts.get(output, ())), shape_of(output)
        for label, size in zip(labels, sizes, strict=True):
            if label not in found or found[label][1] != 1 or shape[found[label][0]] != size:
                return None
        return tuple(found[label][0] for label in labels)

    def _writes_elsewhere(self, node: fx.Node) -> bool:
        """Whether `node` writes in a way that layouts do not cover: see the top of the file."""
        if not is_mutable(node):
            return False
        return rule_of(node) is not POINTWISE or any(source not in self.layouts for source in declared_writes(node))

    def _infer(self, op: fx.Node, result: fx.Node, index: Any) -> None:
        """Give `result`, number `index` of the results of `op`, its layout; lose the labels that it lacks."""
        rule = rule_of(op)
        placed = None if rule is None else self._place(rule, op, result, index)
        if rule is None or placed is None:
            self.lose_all(f"{qualified_name(op)} has no dimension rule" + ("" if rule is None else " for this use"))
            self.layouts[result] = ((),) * len(shape_of(result))
            return
        found = [places(layout) for layout in placed]
        for label in sorted(self.live):
            if any(label not in each for each in found):
                self.lose(label, f"{qualified_name(op)} {rule.loses}")
            elif any(each[label] != found[0][label] for each in found):
                self.lose(label, f"{qualified_name(op)} pairs it with another dimension")
        self.layouts[result] = placed[0]  # as the live labels sit alike in all operands, any of them serves

    def _place(self, rule: Rule, op: fx.Node, result: fx.Node, index: Any) -> list[Layout] | None:
        """The operands of `op` laid out over `result`; None unless the rule accounts for all of them."""
        described = isinstance(index, int) and 0 <= index < rule.results
        if not described or self.several.intersection(op.all_input_nodes):
            return None
        call = OpCall(arguments_of(op), self.layouts, shape_of(result))
        placed = rule.place(call)
        if not placed or len(placed) != len(call.operands):
            return None
        fitting = [fit(each, call.shape) for each in placed if each is not None and len(each) == call.rank]
        return fitting if len(fitting) == len(placed) else None


def _states_and_results(body: fx.GraphModule, num_states: int) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node]]:
    """The nodes of the states, of the new states, checked, and of the outputs."""
    for node in body.graph.nodes:
        if node.op not in ("output", "get_attr") and "val" not in node.meta:
            raise ValueError(f'node {node.name} of the body has no meta["val"]; trace the body with make_fx')
    inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
    if not 1 <= num_states <= len(inputs):
        raise ValueError(f"num_states must be from 1 to {len(inputs)}, the body's inputs, got {num_states}")
    results = list(nodes_in(body.graph.output_node().args[0]))
    new_states, outputs = results[:num_states], results[num_states:]
    before, after = [shape_of(node) for node in inputs[:num_states]], [shape_of(node) for node in new_states]
    if before != after:
        raise ValueError(f"the body must return new states of shapes {before}, but returns {after}")
    return inputs[:num_states], new_states, outputs


def _needed_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the outputs need, and all that write, with what they need."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or is_mutable(node) or not needed.isdisjoint(node.users):
            needed.add(node)
    return needed
