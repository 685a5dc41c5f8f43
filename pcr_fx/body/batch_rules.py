"""What each op does with the layouts of its operands: the rules that the proof of batch dimensions rests on."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from pcr_fx.body.batch_layouts import Layout, align, blank, regroup
from pcr_fx.graphs.nodes import aten_name, nodes_in


@dataclass(frozen=True)
class OpCall:
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
        return [self.layouts[node] for node in nodes_in(values) if node in self.layouts]

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
Place = Callable[[OpCall], Sequence[Layout | None] | None]


class Rule(NamedTuple):
    """What an op does with layouts.

    `loses` is said of a label that an operand lacks afterwards; Of an op with several results the first `results` are described.
    """

    place: Place
    loses: str
    results: float = math.inf


def _elementwise(call: OpCall) -> list[Layout]:
    """Serves slices, splits and repeats too: they give a dimension another size, which makes it opaque."""
    return [align(layout, call.rank) for layout in call.operands]


def _along(call: OpCall) -> list[Layout]:
    """Ops that act along `dim` and elementwise over the others: softmax, cumsum, flip, cat, gather, ..."""
    return [blank(layout, call.dims(call.rank)) for layout in call.operands]


def _reduced(call: OpCall) -> list[Layout]:
    [layout] = call.operands
    dims = call.dims(len(layout))
    if call.arguments.get("keepdim"):
        return [blank(layout, dims)]
    return [tuple(factors for dim, factors in enumerate(layout) if dim not in dims)]


def _viewed(call: OpCall) -> list[Layout | None]:
    return [regroup(layout, call.shape) for layout in call.operands]


def _unsqueezed(call: OpCall) -> list[Layout]:
    """Serves stack too: the size of its new dimension makes it opaque."""
    dim = call.arguments["dim"] % call.rank
    return [(*layout[:dim], (), *layout[dim:]) for layout in call.operands]


def _dropped(call: OpCall) -> list[Layout]:
    [layout] = call.operands
    dim = call.arguments["dim"] % len(layout)
    return [layout[:dim] + layout[dim + 1 :]]


def _permuted(call: OpCall) -> list[Layout]:
    """permute(dims), transpose(dim0, dim1), and t, which has no arguments and leaves a vector as it is."""
    [layout] = call.operands
    order = list(call.arguments.get("dims", range(len(layout))))
    if order and "dims" not in call.arguments:
        first, second = call.arguments.get("dim0", 0), call.arguments.get("dim1", -1)
        order[first], order[second] = order[second], order[first]
    return [tuple(layout[dim] for dim in order)]


def _with_parts(call: OpCall) -> list[Layout]:
    """A further dimension, of real and imaginary parts."""
    return [(*layout, ()) for layout in call.operands]


def _of_parts(call: OpCall) -> list[Layout]:
    return [layout[:-1] for layout in call.operands]


def _mixing_last(count: int) -> Place:
    """The last `count` dimensions are coupled, the others kept: pooling, resampling."""
    return lambda call: [blank(layout, range(call.rank)[-count:]) for layout in call.operands]


def _padded(call: OpCall) -> Sequence[Layout | None] | None:
    padding = call.arguments.get("pad", call.arguments.get("padding"))
    return _mixing_last(len(padding) // 2)(call) if padding else None


def _contraction(equation: str) -> Place:
    """Einsum of the first arguments, as in "ik,kj->ij"; `...`: leading dimensions, `*`: broadcast."""
    inputs, result = equation.split("->")
    terms = inputs.split(",")

    def place(call: OpCall) -> list[Layout]:
        operands = zip(map(call.layout, list(call.arguments)[: len(terms)]), terms, strict=True)
        return [_project(layout, term, result, call.rank) for layout, term in operands if layout is not None]

    return place


def _project(layout: Layout, term: str, result: str, rank: int) -> Layout:
    """One operand of an einsum in the dimensions of the result."""
    if term == "*":
        return align(layout, rank)
    letters, kept = term.removeprefix("..."), result.removeprefix("...")
    leading = len(layout) - len(letters)
    if leading < 0:  # a vector in matmul
        return ((),) * rank
    dimensions = dict(zip(letters, layout[leading:], strict=True))
    front = align(layout[:leading], rank - len(kept))
    return front + tuple(dimensions.get(letter, ()) for letter in kept)


def _indexed(call: OpCall) -> list[Layout] | None:
    """Indices that do not depend on the states, of dimensions one after another, whose place theirs take."""
    indices = call.arguments["indices"]
    dims = [dim for dim, index in enumerate(indices) if index is not None]
    layout = call.layout("self")
    if layout is None or any(index in call.layouts for index in indices) or dims != list(range(dims[0], dims[-1] + 1)):
        return None
    new = call.rank - len(layout) + len(dims)
    return [(*layout[: dims[0]], *((),) * new, *layout[dims[-1] + 1 :])]


def _of_matrices(call: OpCall) -> list[Layout] | None:
    """Of matrices, the last two dimensions, to such."""
    if any(len(layout) != call.rank for layout in call.operands):
        return None
    return _mixing_last(2)(call)  # type: ignore[return-value]


def _of_each_matrix(call: OpCall) -> list[Layout]:
    """Of matrices, the last two dimensions, to one number each."""
    return [layout[:-2] for layout in call.operands]


def _attention(call: OpCall) -> Sequence[Layout | None] | None:
    """Query, key and value; neither dropout nor a mask that depends on the states has a rule."""
    return None if call.arguments.get("dropout_p") else _contraction("...le,...se,...sv->...lv")(call)


def _trilinear(call: OpCall) -> list[Layout]:
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


def _layer_norm(call: OpCall) -> list[Layout]:
    normalised = range(call.rank - len(call.arguments["normalized_shape"]), call.rank)
    layout = call.layout("input")
    affine = [align(other, call.rank) for other in call.others("input")]
    return affine if layout is None else [blank(layout, normalised), *affine]


def _channel_norm(call: OpCall, coupled: Collection[int]) -> list[Layout]:
    """Norms of `[N, C, ...]` with a scale per channel that couple the dimensions `coupled` of the input."""
    layout = call.layout("input")
    affine = [((), *other, *((),) * (call.rank - 2)) for other in call.others("input")]
    return affine if layout is None else [blank(layout, coupled), *affine]


def _batch_norm(call: OpCall) -> list[Layout]:
    """Nothing is coupled in evaluation, all but the channels in training: instance norm is training with the
    batch in the channels. With running statistics to update it is no function: all is coupled."""
    if not call.arguments.get("training"):
        return _channel_norm(call, ())
    updates = call.arguments.get("running_mean") is not None
    return _channel_norm(call, [dim for dim in range(call.rank) if dim != 1 or updates])


def _convolution(call: OpCall) -> list[Layout] | None:
    layout = call.layout("input")
    if layout is None or call.rank != len(call.arguments["stride"]) + 2:
        return None
    return [blank(layout, range(1, call.rank))]


POINTWISE = Rule(_elementwise, "broadcasts it")
_NORM = "normalises over it"
# By name, for all overloads: what differs between them, a rule asks for by the name of the argument. Ops that
# PyTorch tags as pointwise need no entry; the first group is elementwise without the tag, in some releases at
# least.
RULES: dict[str, Rule] = {
    name: rule
    for names, rule in (
        (
            "_conj _neg_view complex polar resolve_conj resolve_neg real imag angle abs sgn "
            "_prelu_kernel _to_copy alias celu_ clone copy copy_ detach elu_ expand fill fill_ floor_divide "
            "floor_divide_ gelu_ hardsigmoid_ hardswish hardswish_ hardtanh_ leaky_relu leaky_relu_ "
            "log_sigmoid_forward masked_fill masked_fill_ mish_ selu_ threshold_",
            POINTWISE,
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
        ("view_as_real", Rule(_with_parts, "drops it")),
        ("view_as_complex", Rule(_of_parts, "drops it")),
        ("_fft_c2c _fft_r2c _fft_c2r", Rule(_along, "transforms it")),
        ("repeat", Rule(_elementwise, "repeats it")),
        # Each number by itself, but by its place.
        ("tril triu", Rule(_mixing_last(2), "takes a triangle of it")),
        (
            "sum mean prod amax amin aminmax argmax argmin max min median kthvalue all any var std var_mean std_mean "
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
        (
            "linalg_inv_ex _linalg_solve_ex linalg_cholesky_ex linalg_solve_triangular cholesky_solve",
            Rule(_of_matrices, "solves along it", results=1),
        ),
        ("_linalg_det", Rule(_of_each_matrix, "takes determinants along it", results=1)),
        ("_linalg_slogdet", Rule(_of_each_matrix, "takes determinants along it", results=2)),
        ("linalg_cross", Rule(_along, "multiplies along it")),
        ("index", Rule(_indexed, "gathers along it")),
        ("matmul", Rule(_contraction("...ik,...kj->...ij"), "contracts it")),
        ("linear", Rule(_contraction("...k,jk,*->...j"), "contracts it")),
        ("_trilinear", Rule(_trilinear, "contracts it")),
        (
            "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
            "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
            "_scaled_dot_product_fused_attention_overrideable",
            Rule(_attention, "attends over it", results=1),
        ),
        # The fused cells of RNNs on CUDA: two parts of the gates, and the state that they update.
        ("_thnn_fused_gru_cell", Rule(_contraction("bg,bg,bh->bh"), "contracts it", results=1)),
        ("_thnn_fused_lstm_cell", Rule(_contraction("bg,bg,bh->bh"), "contracts it", results=2)),
        ("native_layer_norm _fused_rms_norm", Rule(_layer_norm, _NORM, results=1)),
        (
            "native_group_norm",
            Rule(lambda call: _channel_norm(call, range(1, call.rank)), _NORM, results=1),
        ),
        (
            "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
            "_batch_norm_no_update cudnn_batch_norm miopen_batch_norm",
            Rule(_batch_norm, _NORM, results=1),
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
SHAPE_ONLY = ("empty_like", "full_like", "new_", "ones_like", "sym_", "zeros_like")


def rule_of(node: fx.Node) -> Rule | None:
    name = aten_name(node)
    if name is None:
        return None
    is_pointwise = torch.Tag.pointwise in node.target.tags  # type: ignore[union-attr]
    return POINTWISE if is_pointwise else RULES.get(name)
