"""Which dimensions of a body's states are batch dimensions: a proof by abstract interpretation.

Dimension b is a *batch dimension* when every output at index i along b depends on the states at index i only.
The Jacobian is computed with cotangents that are broadcast along the batch dimensions, so a wrong claim would
be a wrong number: the proof is conservative, and an op without a rule couples everything.

Each candidate dimension gets a *label*; each tensor that depends on the states has a *layout*: per dimension,
the ordered factors that it is made of, so that a view [B, T, w] -> [B * T, w] and back keeps B and T apart.
The invariant: such a tensor carries each live label exactly once, and what it holds at an index along the
label depends on the states at this index only. A rule lays the operands of an op out over the dimensions of
its output. A label that one operand then lacks, or has elsewhere than another, is lost: the op couples it.

Writes in place need no alias analysis: an elementwise write into a tensor that has a layout, with all its
operands in agreement, leaves the invariant true for every view of that memory. Any other write of states
couples everything.
"""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx


@dataclass(frozen=True)
class BatchDimensions:
    """The batch dimensions of a body.

    Attributes:
        dims: the dimensions proved, ascending; the same positions in every state.
        reasons: for each other dimension of the first state, what couples it, as in "aten.mm contracts it".
    """

    dims: tuple[int, ...]
    reasons: Mapping[int, str] = field(default_factory=dict, hash=False)


def prove_batch_dimensions(
    body: fx.GraphModule, num_states: int, followers: Mapping[int, Sequence[int]] | None = None
) -> BatchDimensions:
    """The dimensions along which `body` provably acts independently.

    Candidates are the positions that exist, with one size, in every state. The proof reads the ops, not the
    sizes: a dimension of size 1 is claimed only if, as far as a graph traced at size 1 tells, the ops would
    keep it apart at any size.

    Args:
        body: aten graph `(*states, *others) -> (*new_states,)`, with static shapes, and with `meta["val"]` on
            its inputs and ops, as `make_fx` leaves them.
        num_states: how many of the first inputs are states.
        followers: inputs that are supposed to have a part for each sample, by position: for their first dimensions the
            dimensions of the states that they follow. A dimension is then proved only if it is for those inputs too.

    Raises:
        ValueError: `body` is not such a graph, or has fewer inputs than `num_states`.
    """
    states, outputs = _states_and_outputs(body, num_states)
    shapes = [_shape(state) for state in states]
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
        shape = _shape(inputs[position])
        named = [*labels, *(None for _ in shape[len(labels) :])]
        proof.layouts[inputs[position]] = tuple((Factor(*pair),) for pair in zip(named, shape, strict=True))
    needed = _needed_nodes(body.graph)
    for node in body.graph.nodes:
        # Once nothing lives, nothing can be learnt, and numbers taken out of tensors need no layouts.
        if proof.live and node in needed and node.op not in ("placeholder", "output"):
            proof.visit(node)
    proof.check_outputs(outputs)
    return BatchDimensions(tuple(sorted(proof.live)), dict(sorted(proof.reasons.items())))


# --- layouts ------------------------------------------------------------------------------------------------


class Factor(NamedTuple):
    """A part of a dimension: all of a labelled dimension of the states, or anything else (no label)."""

    label: int | None
    size: int


Dimension = tuple[Factor, ...]  # major to minor; () is opaque: no label, whatever the size
Layout = tuple[Dimension, ...]


def _size(factors: Dimension) -> int:
    return math.prod(factor.size for factor in factors)


def _places(layout: Layout) -> dict[int, tuple[int, int]]:
    """Where each label is: (dimension, stride within the dimension)."""
    places: dict[int, tuple[int, int]] = {}
    for dim, factors in enumerate(layout):
        stride = 1
        for factor in reversed(factors):
            if factor.label is not None:
                places[factor.label] = (dim, stride)
            stride *= factor.size
    return places


def _fit(layout: Layout, shape: Sequence[int]) -> Layout:
    """`layout` for an output of `shape`: a dimension of another size, as in a broadcast, is opaque."""
    return tuple(
        factors if _size(factors) == size else (Factor(None, size),)
        for factors, size in zip(layout, shape, strict=True)
    )


def _align(layout: Layout, rank: int) -> Layout:
    """`layout` in the last of `rank` dimensions, as in a broadcast."""
    return ((),) * (rank - len(layout)) + layout


def _blank(layout: Layout, dims: Collection[int]) -> Layout:
    """`layout` with `dims` opaque."""
    return tuple(() if dim in dims else factors for dim, factors in enumerate(layout))


def _regroup(layout: Layout, shape: Sequence[int]) -> Layout | None:
    """The layout of a view with `shape`: factors join and split as the sizes ask; a cut label is lost.

    Factors of size 1 fit anywhere. They go one each to output dimensions of size 1 in the same place, and the
    rest into the dimension before, so that [B, 1, w] -> [B, w] -> [B, 1, w] keeps both labels.
    """
    pending = deque(factor for factors in layout for factor in factors or (Factor(None, 1),))
    total = _size(tuple(pending))
    if total == 0 or total != math.prod(shape):
        return None
    dimensions = []
    for size, following in zip(shape, (*shape[1:], None), strict=True):
        factors = _take(pending, size)
        if size == 1 and pending and pending[0].size == 1:
            factors.append(pending.popleft())
        while following != 1 and pending and pending[0].size == 1:
            factors.append(pending.popleft())
        dimensions.append(tuple(factors))
    return tuple(dimensions)


def _take(pending: deque[Factor], size: int) -> list[Factor]:
    """Take factors of total `size`, which divides the total of all, from the front of `pending`."""
    taken: list[Factor] = []
    need = size
    while need > 1:
        factor = pending.popleft()
        if need % factor.size == 0:
            taken.append(factor)
            need //= factor.size
        elif factor.size % need == 0:
            taken.append(Factor(None, need))
            pending.appendleft(Factor(None, factor.size // need))
            need = 1
        else:  # the boundary cuts through factors, as in [4, 3] -> [3, 4]: melt them and start again
            melted = [*taken, factor, *([pending.popleft()] if pending else [])]
            pending.appendleft(Factor(None, _size(tuple(melted))))
            taken, need = [], size
    return taken


# --- rules --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One op as its rule sees it."""

    arguments: Mapping[str, Any]  # by their names in the schema, defaults filled in
    layouts: Mapping[fx.Node, Layout]  # of the tensors that depend on the states
    shape: tuple[int, ...]  # of the result

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def operands(self) -> list[Layout]:
        """The layouts of all arguments that depend on the states, in the order of the schema."""
        return self.others()

    def others(self, *names: str) -> list[Layout]:
        """`operands` without the arguments `names`."""
        values = [value for name, value in self.arguments.items() if name not in names]
        return [self.layouts[node] for node in _nodes_in(values) if node in self.layouts]

    def layout(self, name: str) -> Layout | None:
        """The layout of one argument, if it depends on the states."""
        value = self.arguments[name]
        return self.layouts.get(value) if isinstance(value, fx.Node) else None

    def dims(self, rank: int) -> set[int]:
        """The argument `dim` or `dims`, counted from the front; none given means all."""
        given = self.arguments.get("dim", self.arguments.get("dims"))
        if given is None or given == []:
            return set(range(rank))
        return {dim % max(rank, 1) for dim in ([given] if isinstance(given, int) else given)}


# Lays the operands out over the dimensions of the result. None instead of a layout, or of the list, says that
# this use has no rule; so does an operand left out.
Place = Callable[[Call], Sequence[Layout | None] | None]


class Rule(NamedTuple):
    """What an op does with layouts.

    `loses` is said of a label that an operand lacks afterwards; `outputs` of the results are described.
    """

    place: Place
    loses: str
    outputs: float = math.inf


def _elementwise(call: Call) -> list[Layout]:
    """Serves slices, splits and repeats too: they give a dimension another size, which makes it opaque."""
    return [_align(layout, call.rank) for layout in call.operands]


def _along(call: Call) -> list[Layout]:
    """Ops that act along `dim` and elementwise over the others: softmax, cumsum, flip, cat, gather, ..."""
    return [_blank(layout, call.dims(call.rank)) for layout in call.operands]


def _reduced(call: Call) -> list[Layout]:
    [layout] = call.operands
    dims = call.dims(len(layout))
    if call.arguments.get("keepdim"):
        return [_blank(layout, dims)]
    return [tuple(factors for dim, factors in enumerate(layout) if dim not in dims)]


def _viewed(call: Call) -> list[Layout | None]:
    return [_regroup(layout, call.shape) for layout in call.operands]


def _unsqueezed(call: Call) -> list[Layout]:
    """Serves stack too: the size of its new dimension makes it opaque."""
    dim = call.arguments["dim"] % call.rank
    return [(*layout[:dim], (), *layout[dim:]) for layout in call.operands]


def _dropped(call: Call) -> list[Layout]:
    [layout] = call.operands
    dim = call.arguments["dim"] % len(layout)
    return [layout[:dim] + layout[dim + 1 :]]


def _permuted(call: Call) -> list[Layout]:
    """permute(dims), transpose(dim0, dim1), and t, which has no arguments and leaves a vector as it is."""
    [layout] = call.operands
    order = list(call.arguments.get("dims", range(len(layout))))
    if order and "dims" not in call.arguments:
        first, second = call.arguments.get("dim0", 0), call.arguments.get("dim1", -1)
        order[first], order[second] = order[second], order[first]
    return [tuple(layout[dim] for dim in order)]


def _mixing_last(count: int) -> Place:
    """The last `count` dimensions are coupled, the others kept: pooling, resampling."""
    return lambda call: [_blank(layout, range(call.rank)[-count:]) for layout in call.operands]


def _padded(call: Call) -> Sequence[Layout | None] | None:
    padding = call.arguments.get("pad", call.arguments.get("padding"))
    return _mixing_last(len(padding) // 2)(call) if padding else None


def _contraction(equation: str) -> Place:
    """Einsum of the first arguments, as in "ik,kj->ij"; `...`: leading dimensions, `*`: broadcast."""
    inputs, output = equation.split("->")
    terms = inputs.split(",")

    def place(call: Call) -> list[Layout]:
        operands = zip(map(call.layout, list(call.arguments)[: len(terms)]), terms, strict=True)
        return [_project(layout, term, output, call.rank) for layout, term in operands if layout is not None]

    return place


def _project(layout: Layout, term: str, output: str, rank: int) -> Layout:
    """One operand of an einsum in the dimensions of the output."""
    if term == "*":
        return _align(layout, rank)
    letters, kept = term.removeprefix("..."), output.removeprefix("...")
    leading = len(layout) - len(letters)
    if leading < 0:  # a vector in matmul
        return ((),) * rank
    dimensions = dict(zip(letters, layout[leading:], strict=True))
    front = _align(layout[:leading], rank - len(kept))
    return front + tuple(dimensions.get(letter, ()) for letter in kept)


def _attention(call: Call) -> Sequence[Layout | None] | None:
    """Query, key and value; neither dropout nor a mask that depends on the states has a rule."""
    return None if call.arguments.get("dropout_p") else _contraction("...le,...se,...sv->...lv")(call)


def _trilinear(call: Call) -> list[Layout]:
    """Sum over `sumdim` of the product of `i1`, `i2` and `i3`, each unsqueezed at its `expand`."""
    placed = []
    for name, expand in (("i1", "expand1"), ("i2", "expand2"), ("i3", "expand3")):
        layout = call.layout(name)
        if layout is not None:
            for dim in call.arguments[expand]:
                layout = (*layout[:dim], (), *layout[dim:])
            summed = call.arguments["sumdim"]
            placed.append(tuple(factors for dim, factors in enumerate(layout) if dim not in summed))
    return placed


def _layer_norm(call: Call) -> list[Layout]:
    normalised = range(call.rank - len(call.arguments["normalized_shape"]), call.rank)
    layout = call.layout("input")
    affine = [_align(other, call.rank) for other in call.others("input")]
    return affine if layout is None else [_blank(layout, normalised), *affine]


def _channel_norm(call: Call, coupled: Collection[int]) -> list[Layout]:
    """Norms of `[N, C, ...]` with a scale per channel that couple the dimensions `coupled` of the input."""
    layout = call.layout("input")
    affine = [((), *other, *((),) * (call.rank - 2)) for other in call.others("input")]
    return affine if layout is None else [_blank(layout, coupled), *affine]


def _batch_norm(call: Call) -> list[Layout]:
    """Nothing is coupled in evaluation, all but the channels in training: instance norm is training with the
    batch in the channels. With running statistics to update it is no function: all is coupled."""
    if not call.arguments.get("training"):
        return _channel_norm(call, ())
    updates = call.arguments.get("running_mean") is not None
    return _channel_norm(call, [dim for dim in range(call.rank) if dim != 1 or updates])


def _convolution(call: Call) -> list[Layout] | None:
    layout = call.layout("input")
    if layout is None or call.rank != len(call.arguments["stride"]) + 2:
        return None
    return [_blank(layout, range(1, call.rank))]


_POINTWISE = Rule(_elementwise, "broadcasts it")
_NORM = "normalises over it"

# By name, for all overloads: what differs between them, a rule asks for by the name of the argument. Ops that
# PyTorch tags as pointwise need no entry; the first group is elementwise without the tag, in some releases at
# least.
RULES: dict[str, Rule] = {
    name: rule
    for names, rule in (
        (
            "_prelu_kernel _to_copy alias celu_ clone copy copy_ detach elu_ expand fill fill_ floor_divide "
            "floor_divide_ gelu_ hardsigmoid_ hardswish hardswish_ hardtanh_ leaky_relu leaky_relu_ "
            "log_sigmoid_forward masked_fill masked_fill_ mish_ selu_ threshold_ tril tril_ triu triu_",
            _POINTWISE,
        ),
        (
            "slice split unsafe_split split_with_sizes unsafe_split_with_sizes",
            Rule(_elementwise, "takes a part of it"),
        ),
        ("select unbind", Rule(_dropped, "takes a part of it")),
        ("view _unsafe_view reshape _reshape_alias", Rule(_viewed, "cuts through it, or drops it")),
        ("squeeze", Rule(_viewed, "drops it")),
        ("unsqueeze stack", Rule(_unsqueezed, "drops it")),
        ("permute transpose t", Rule(_permuted, "drops it")),
        ("repeat", Rule(_elementwise, "repeats it")),
        (
            "sum mean prod amax amin aminmax argmax argmin max min median all any var std var_mean std_mean "
            "logsumexp norm linalg_vector_norm",
            Rule(_reduced, "reduces over it"),
        ),
        ("_softmax _log_softmax _safe_softmax softmax log_softmax", Rule(_along, _NORM)),
        ("_softmax_backward_data _log_softmax_backward_data", Rule(_along, _NORM)),
        ("cumsum cumprod logcumsumexp cummax cummin", Rule(_along, "scans it")),
        ("flip roll sort topk", Rule(_along, "reorders it")),
        ("gather index_select", Rule(_along, "gathers along it")),
        ("cat", Rule(_along, "concatenates along it")),
        ("glu", Rule(_along, "halves it")),
        ("constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d", Rule(_padded, "pads it")),
        ("replication_pad1d replication_pad2d replication_pad3d", Rule(_padded, "pads it")),
        ("mm", Rule(_contraction("ik,kj->ij"), "contracts it")),
        ("addmm", Rule(_contraction("*,ik,kj->ij"), "contracts it")),
        ("bmm", Rule(_contraction("bik,bkj->bij"), "contracts it")),
        ("baddbmm", Rule(_contraction("*,bik,bkj->bij"), "contracts it")),
        ("mv", Rule(_contraction("ik,k->i"), "contracts it")),
        ("addmv", Rule(_contraction("*,ik,k->i"), "contracts it")),
        ("dot", Rule(_contraction("k,k->"), "contracts it")),
        ("matmul", Rule(_contraction("...ik,...kj->...ij"), "contracts it")),
        ("linear", Rule(_contraction("...k,jk,*->...j"), "contracts it")),
        ("_trilinear", Rule(_trilinear, "contracts it")),
        (
            "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
            "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
            "_scaled_dot_product_fused_attention_overrideable",
            Rule(_attention, "attends over it", outputs=1),
        ),
        # The fused cells of RNNs on CUDA: two parts of the gates, and the state that they update.
        ("_thnn_fused_gru_cell", Rule(_contraction("bg,bg,bh->bh"), "contracts it", outputs=1)),
        ("_thnn_fused_lstm_cell", Rule(_contraction("bg,bg,bh->bh"), "contracts it", outputs=2)),
        ("native_layer_norm _fused_rms_norm", Rule(_layer_norm, _NORM, outputs=1)),
        (
            "native_group_norm",
            Rule(lambda call: _channel_norm(call, range(1, call.rank)), _NORM, outputs=1),
        ),
        (
            "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
            "_batch_norm_no_update cudnn_batch_norm miopen_batch_norm",
            Rule(_batch_norm, _NORM, outputs=1),
        ),
        ("convolution", Rule(_convolution, "convolves it")),
        (
            "avg_pool2d _adaptive_avg_pool2d max_pool2d_with_indices adaptive_max_pool2d upsample_nearest2d "
            "upsample_bilinear2d",
            Rule(_mixing_last(2), "mixes it"),
        ),
    )
    for name in names.split()
}

# Beginnings of the names of ops whose results depend on the shape of their argument, not on its data.
_SHAPE_ONLY = ("empty_like", "full_like", "new_", "ones_like", "sym_", "zeros_like")


# --- the proof ----------------------------------------------------------------------------------------------


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
        if _is_random(node):
            self.lose_all(f"{_name(node)} draws random numbers")
        if not any(source in self.layouts or source in self.several for source in node.all_input_nodes):
            return
        if (_aten_name(node) or "").startswith(_SHAPE_ONLY):
            return
        if self._writes_elsewhere(node):
            self.lose_all(f"{_name(node)} has no dimension rule for what it writes")
        if node.target is operator.getitem and node.args[0] in self.several:
            self._infer(node.args[0], node, node.args[1])  # type: ignore[arg-type]
        elif isinstance(node.meta["val"], tuple | list):
            self.several.add(node)
        else:
            self._infer(node, node, 0)

    def check_outputs(self, outputs: Sequence[fx.Node]) -> None:
        """A label lives only if each new state that depends on the states has it as its own dimension."""
        for output in outputs:
            places = _places(self.layouts.get(output, ()))
            for label in sorted(self.live if output in self.layouts else ()):
                if places[label] != (label, 1):
                    self.lose(label, "the new state has it in another dimension")

    def _writes_elsewhere(self, node: fx.Node) -> bool:
        """Whether `node` writes in a way that layouts do not cover: see the top of the file."""
        if not _is_mutable(node):
            return False
        arguments = _arguments(node)
        written = [
            source
            for declared in node.target._schema.arguments  # type: ignore[union-attr]
            if declared.alias_info is not None and declared.alias_info.is_write
            for source in _nodes_in(arguments[declared.name])
        ]
        return _rule(node) is not _POINTWISE or any(source not in self.layouts for source in written)

    def _infer(self, op: fx.Node, result: fx.Node, index: Any) -> None:
        """Give `result`, number `index` of the results of `op`, its layout; lose the labels that it lacks."""
        rule = _rule(op)
        placed = None if rule is None else self._place(rule, op, result, index)
        if rule is None or placed is None:
            self.lose_all(f"{_name(op)} has no dimension rule" + ("" if rule is None else " for this use"))
            self.layouts[result] = ((),) * len(_shape(result))
            return
        places = [_places(layout) for layout in placed]
        for label in sorted(self.live):
            if any(label not in found for found in places):
                self.lose(label, f"{_name(op)} {rule.loses}")
            elif any(found[label] != places[0][label] for found in places):
                self.lose(label, f"{_name(op)} pairs it with another dimension")
        self.layouts[result] = placed[0]  # as the live labels sit alike in all operands, any of them serves

    def _place(self, rule: Rule, op: fx.Node, result: fx.Node, index: Any) -> list[Layout] | None:
        """The operands of `op` laid out over `result`; None unless the rule accounts for all of them."""
        described = isinstance(index, int) and 0 <= index < rule.outputs
        if not described or self.several.intersection(op.all_input_nodes):
            return None
        call = Call(_arguments(op), self.layouts, _shape(result))
        placed = rule.place(call)
        if not placed or len(placed) != len(call.operands):
            return None
        fitting = [_fit(each, call.shape) for each in placed if each is not None and len(each) == call.rank]
        return fitting if len(fitting) == len(placed) else None


# --- graphs -------------------------------------------------------------------------------------------------


def _states_and_outputs(body: fx.GraphModule, num_states: int) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes of the states and of the new states, checked."""
    for node in body.graph.nodes:
        if node.op not in ("output", "get_attr") and "val" not in node.meta:
            raise ValueError(f'node {node.name} of the body has no meta["val"]; trace the body with make_fx')
    inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
    if not 1 <= num_states <= len(inputs):
        raise ValueError(f"num_states must be from 1 to {len(inputs)}, the body's inputs, got {num_states}")
    outputs = list(_nodes_in(body.graph.output_node().args[0]))
    before, after = [_shape(node) for node in inputs[:num_states]], [_shape(node) for node in outputs]
    if before != after:
        raise ValueError(f"the body must return new states of shapes {before}, but returns {after}")
    return inputs[:num_states], outputs


def _needed_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the outputs need, and all that write, with what they need."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or _is_mutable(node) or not needed.isdisjoint(node.users):
            needed.add(node)
    return needed


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Of the tensor that `node` makes; () for a number."""
    return tuple(int(size) for size in getattr(node.meta.get("val"), "shape", ()))


def _name(node: fx.Node) -> str:
    """As in messages, without the overload: aten.mm."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.replace("::", ".")
    return getattr(node.target, "__name__", str(node.target))


def _aten_name(node: fx.Node) -> str | None:
    is_aten = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten"
    return _name(node).removeprefix("aten.") if is_aten else None


def _rule(node: fx.Node) -> Rule | None:
    name = _aten_name(node)
    if name is None:
        return None
    is_pointwise = torch.Tag.pointwise in node.target.tags  # type: ignore[union-attr]
    return _POINTWISE if is_pointwise else RULES.get(name)


def _is_random(node: fx.Node) -> bool:
    """Attention is tagged for the dropout that it could do, which its rule looks at."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags and _aten_name(node) not in RULES


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an op by their names in its schema."""
    declared = node.target._schema.arguments  # type: ignore[union-attr]
    given = {argument.name: value for argument, value in zip(declared, node.args, strict=False)}
    return {argument.name: argument.default_value for argument in declared} | given | dict(node.kwargs)


def _nodes_in(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _nodes_in(item)
