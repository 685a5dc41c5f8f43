"""Ops of one sample written out in few simpler ones, from which kernels are lowered.

Sizes are known here, and mostly small: an op along a dimension is written out number by number where there are few of them.
A decomposition returns `NotImplemented` where there are too many; the op then stays, and the kernel's rules name it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions

from pcr_fx.body.convolution_ops import CONVOLUTION_OPS
from pcr_fx.body.matrix_ops import MATRIX_OPS
from pcr_fx.body.number_ops import NUMBER_OPS
from pcr_fx.body.order_ops import ORDER_OPS
from pcr_fx.body.pooling_ops import POOLING_OPS

aten = torch.ops.aten


# --- numbers ------------------------------------------------------------------------------------------------------------


def _smooth_l1_loss_backward(cotangent: Tensor, input: Tensor, target: Tensor, reduction: int, beta: float) -> Tensor:
    """As PyTorch's kernels have it: NaN at NaN, where its decomposition gives 0."""
    difference = input - target
    weight = 1 / difference.numel() if reduction == 1 else 1.0  # of a mean
    inner = torch.where(difference >= beta, weight, weight / beta * difference)
    return torch.where(difference <= -beta, -weight, inner) * cotangent


# --- moves --------------------------------------------------------------------------------------------------------------


def _roll(x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor:
    if not dims:
        return _roll(x.reshape(-1), shifts, [0]).reshape(x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        size = x.shape[dim]
        if size and shift % size:
            x = torch.cat(
                [x.narrow(dim, size - shift % size, shift % size), x.narrow(dim, 0, size - shift % size)], dim
            )
    return x


def _diag_embed(x: Tensor, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tensor:
    rank = x.dim() + 1
    dim1, dim2 = dim1 % rank, dim2 % rank
    sizes = list(x.shape[:-1])
    for dim in sorted((dim1, dim2)):
        sizes.insert(dim, x.shape[-1] + abs(offset))
    return torch.diagonal_scatter(x.new_zeros(sizes), x, offset, dim1, dim2)


def _cross(a: Tensor, b: Tensor, *, dim: int = -1) -> Tensor:
    (a0, a1, a2), (b0, b1, b2) = a.unbind(dim), b.unbind(dim)
    return torch.stack([a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0], dim)


def _embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    return aten.index.Tensor(weight, [indices])


def _embedding_backward(
    cotangent: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Any:
    if padding_idx >= 0 or scale_grad_by_freq:
        return NotImplemented
    zeros = cotangent.new_zeros(num_weights, cotangent.shape[-1])
    return aten.index_put.default(zeros, [indices], cotangent, True)


def _trilinear(
    first: Tensor,
    second: Tensor,
    third: Tensor,
    new_in_first: Sequence[int],
    new_in_second: Sequence[int],
    new_in_third: Sequence[int],
    summed: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:
    """The sum over some dimensions of a product of three, each with new dimensions."""
    for dim in new_in_first:
        first = first.unsqueeze(dim)
    for dim in new_in_second:
        second = second.unsqueeze(dim)
    for dim in new_in_third:
        third = third.unsqueeze(dim)
    return (first * second * third).sum(list(summed))


# --- all of them --------------------------------------------------------------------------------------------------------

_PYTORCHS = """native_layer_norm native_layer_norm_backward _fused_rms_norm _fused_rms_norm_backward native_group_norm
native_group_norm_backward _native_batch_norm_legit_no_training _native_batch_norm_legit native_batch_norm
native_batch_norm_backward _softmax _log_softmax _softmax_backward_data _log_softmax_backward_data gelu gelu_backward silu
silu_backward softplus softplus_backward elu elu_backward celu selu leaky_relu leaky_relu_backward hardtanh
hardtanh_backward hardswish hardswish_backward hardsigmoid hardsigmoid_backward mish mish_backward log_sigmoid_forward
log_sigmoid_backward tanh_backward sigmoid_backward threshold threshold_backward addcmul addcdiv lerp stack dot mv addmv
addr split rsub select_backward slice_backward linalg_vector_norm norm logsumexp sinc prelu _prelu_kernel
_prelu_kernel_backward _thnn_fused_gru_cell _thnn_fused_lstm_cell native_dropout square trace repeat unsafe_split glu
glu_backward""".split()

# Of PyTorch's decompositions, those of ops that kernels know themselves, or that are written out above.
_KEPT = """addmm mm bmm baddbmm var var_mean mean sum select_scatter slice_scatter diagonal_scatter eye flip""".split()

_OWN: dict[Any, Callable[..., Any]] = {
    aten.smooth_l1_loss_backward.default: _smooth_l1_loss_backward,
    # As PyTorch computes it; what it is decomposed to before 2.13 has another sign of zero.
    aten.frac.default: lambda x: x - torch.trunc(x),
    **NUMBER_OPS,
    **CONVOLUTION_OPS,
    **MATRIX_OPS,
    **ORDER_OPS,
    **POOLING_OPS,
    aten.roll.default: _roll,
    aten.diag_embed.default: _diag_embed,
    aten.linalg_cross.default: _cross,
    aten.embedding.default: _embedding,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten._trilinear.default: _trilinear,
}


def _all() -> dict[Any, Callable[..., Any]]:
    table = {**core_aten_decompositions(), **get_decompositions([getattr(aten, name) for name in _PYTORCHS])}
    kept = set(_KEPT)
    return {op: rule for op, rule in table.items() if op.name().split("::")[1].split(".")[0] not in kept} | _OWN


DECOMPOSITIONS = _all()
