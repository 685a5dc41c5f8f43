"""Ops of one sample written out in few simpler ones, from which kernels are lowered.

Sizes are known here, and mostly small: an op along a dimension is written out number by number where there are few of them.
A decomposition returns `NotImplemented` where there are too many; the op then stays, and the kernel's rules name it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions

from pcr_fx.body.number_ops import NUMBER_OPS

aten = torch.ops.aten

# Numbers along a dimension that are compared each with each; rows of a matrix that is factorised; numbers along a
# dimension that are gone through one after another.
_MAX_COMPARED, _MAX_ROWS, _MAX_IN_TURN = 16, 8, 64


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


# --- along a dimension --------------------------------------------------------------------------------------------------


def _running(combine: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """All results of combining the numbers along a dimension one after another."""

    def running(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
        if x.dim() == 0 or not 0 < x.shape[dim] <= _MAX_IN_TURN:
            return NotImplemented
        first, *others = (x if dtype is None else x.to(dtype)).unbind(dim)
        results = [first]
        for other in others:
            results.append(combine(results[-1], other))
        return torch.stack(results, dim)

    return running


def _product(x: Tensor, dim: int | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    if dim is None:
        x, dim = x.reshape(-1), 0
    running = _running(torch.mul)(x, dim, dtype=dtype)
    if running is NotImplemented:
        return running
    return running.narrow(dim, -1, 1) if keepdim else running.select(dim, -1)


def _before(a: Tensor, b: Tensor, descending: bool) -> Tensor:
    """Whether a number stands before another in order; NaN is the largest."""
    if descending:
        a, b = b, a
    return (a < b) | (b.isnan() & ~a.isnan()) if a.is_floating_point() else a < b


def _first_in_order(descending: bool) -> Callable[..., Any]:
    """The largest or smallest number along a dimension, and where it first is: NaN before all others, as in PyTorch."""

    def first(x: Tensor, dim: int, keepdim: bool = False) -> Any:
        if x.dim() == 0 or not 0 < x.shape[dim] <= _MAX_IN_TURN:
            return NotImplemented
        best, *others = x.unbind(dim)
        place = torch.zeros_like(best, dtype=torch.int64)
        for index, other in enumerate(others, 1):
            better = other > best if descending else other < best
            if x.is_floating_point():
                better = better | (other.isnan() & ~best.isnan())
            best, place = torch.where(better, other, best), torch.where(better, index, place)
        return (best.unsqueeze(dim), place.unsqueeze(dim)) if keepdim else (best, place)

    return first


def _place_of_first(descending: bool) -> Callable[..., Any]:
    first = _first_in_order(descending)

    def place(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
        if dim is None and keepdim:
            return NotImplemented
        found = first(x.reshape(-1), 0) if dim is None else first(x, dim, keepdim)
        return found if found is NotImplemented else found[1]

    return place


def _sorted(x: Tensor, dim: int = -1, descending: bool = False) -> Any:
    """Each number goes to the place that is the count of those before it; equal ones stay in order."""
    if x.dim() == 0 or not 0 < x.shape[dim] <= _MAX_COMPARED:
        return NotImplemented
    parts = x.unbind(dim)
    ranks = []
    for index, part in enumerate(parts):
        rank = torch.zeros_like(part, dtype=torch.int64)
        for other_index, other in enumerate(parts):
            if other_index < index:
                rank = rank + (~_before(part, other, descending)).to(torch.int64)
            elif other_index > index:
                rank = rank + _before(other, part, descending).to(torch.int64)
        ranks.append(rank)
    values, places = [], []
    for wanted in range(len(parts)):
        value, place = parts[0], torch.zeros_like(ranks[0])
        for index in range(1, len(parts)):
            here = ranks[index] == wanted
            value, place = torch.where(here, parts[index], value), torch.where(here, index, place)
        values.append(value)
        places.append(place)
    return torch.stack(values, dim), torch.stack(places, dim)


def _stably_sorted(x: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    return _sorted(x, dim, descending)


def _largest(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    found = _sorted(x, dim, largest)
    return found if found is NotImplemented else tuple(part.narrow(dim, 0, k) for part in found)


def _kth(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    """The k-th number in order, counted from 1; NaN is the largest."""
    found = _sorted(x, dim)
    if found is NotImplemented:
        return found
    taken = [part.narrow(dim, k - 1, 1) for part in found]
    return tuple(taken) if keepdim else tuple(part.squeeze(dim) for part in taken)


def _median(x: Tensor, dim: int, keepdim: bool = False) -> Any:
    """The lower one of two in the middle; NaN where there is one."""
    found = _sorted(x, dim)
    if found is NotImplemented:
        return found
    middle, last = (
        [part.narrow(dim, place, 1) for part in found] for place in ((x.shape[dim] - 1) // 2, x.shape[dim] - 1)
    )
    if x.is_floating_point():
        middle = [torch.where(last[0].isnan(), there, here) for here, there in zip(middle, last, strict=True)]
    return tuple(middle) if keepdim else tuple(part.squeeze(dim) for part in middle)


# --- small matrices -----------------------------------------------------------------------------------------------------


def _rows(matrix: Tensor) -> list[list[Tensor]]:
    """The numbers of a matrix `[..., n, m]` by row and column: each `[..., 1]`."""
    return [[number for number in row.split(1, -1)] for row in matrix.unbind(-2)]


def _matrix(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.stack([torch.cat(list(row), -1) for row in rows], -2)


def _is_small(matrix: Tensor) -> bool:
    return matrix.is_floating_point() and 0 < matrix.shape[-1] <= _MAX_ROWS and 0 < matrix.shape[-2] <= _MAX_ROWS


def _factorised(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """LU with partial pivoting, as LAPACK has it: the factors in one matrix, pivots counted from 1, swaps as -1 or 1."""
    rows, size = _rows(matrix), matrix.shape[-1]
    pivots, sign = [], torch.ones_like(rows[0][0])
    for column in range(size):
        largest, pivot = rows[column][column].abs(), torch.full_like(rows[0][0], column, dtype=torch.int64)
        for row in range(column + 1, size):
            better = rows[row][column].abs() > largest
            largest = torch.where(better, rows[row][column].abs(), largest)
            pivot = torch.where(better, row, pivot)
        rows = _swapped(rows, column, pivot)
        sign = torch.where(pivot == column, sign, -sign)
        pivots.append(pivot + 1)
        for row in range(column + 1, size):
            factor = rows[row][column] / rows[column][column]
            # A column of zeros stays one, as in LAPACK, and its matrix is singular.
            factor = torch.where(largest == 0, rows[row][column], factor)
            rows[row] = [
                *rows[row][:column],
                factor,
                *(rows[row][other] - factor * rows[column][other] for other in range(column + 1, size)),
            ]
    return _matrix(rows), torch.cat(pivots, -1), sign.squeeze(-1)


def _swapped(rows: list[list[Tensor]], first: int, other: Tensor) -> list[list[Tensor]]:
    """`rows` with row `first` in place of row `other`, a number of each sample, which is not before it, and the reverse."""
    rows, moved = list(rows), rows[first]
    for row in range(first + 1, len(rows)):
        here = other == row
        moved, rows[row] = (
            [torch.where(here, theirs, ours) for theirs, ours in zip(rows[row], moved, strict=True)],
            [torch.where(here, first_row, theirs) for first_row, theirs in zip(rows[first], rows[row], strict=True)],
        )
    rows[first] = moved
    return rows


def _substituted(factors: Tensor, right: Tensor, upper: bool, unit: bool) -> Tensor:
    """X of `factors @ X = right`, of which one triangle is read: `[..., n, n]` and `[..., n, m]`."""
    rows, results = _rows(factors), list(right.unbind(-2))
    size = len(rows)
    for row in reversed(range(size)) if upper else range(size):
        solved = range(row + 1, size) if upper else range(row)
        for other in solved:
            results[row] = results[row] - rows[row][other] * results[other]
        if not unit:
            results[row] = results[row] / rows[row][row]
    return torch.stack(results, -2)


def _triangular_solve(
    matrix: Tensor, right: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Any:
    if not _is_small(matrix):
        return NotImplemented
    if not left:
        return _triangular_solve(matrix.mT, right.mT, upper=not upper, unitriangular=unitriangular).mT
    batch = torch.broadcast_shapes(matrix.shape[:-2], right.shape[:-2])
    right = right.expand(*batch, *right.shape[-2:])
    return _substituted(matrix, right, upper, unitriangular)


def _permuted(right: Tensor, pivots: Tensor, reverse: bool = False) -> Tensor:
    """`right` `[..., n, m]` with its rows swapped as `pivots` `[..., n]` have it, in their order or the reverse."""
    rows = [list(row.split(1, -1)) for row in right.unbind(-2)]
    steps = range(len(rows))
    for step in reversed(steps) if reverse else steps:
        rows = _swapped(rows, step, pivots[..., step : step + 1] - 1)
    return _matrix(rows)


def _lu_solve(factors: Tensor, pivots: Tensor, right: Tensor, *, left: bool = True, adjoint: bool = False) -> Any:
    if not _is_small(factors):
        return NotImplemented
    if not left:
        return _lu_solve(factors, pivots, right.mT, adjoint=not adjoint).mT
    batch = torch.broadcast_shapes(factors.shape[:-2], right.shape[:-2])
    right = right.expand(*batch, *right.shape[-2:])
    if not adjoint:
        lower = _substituted(factors, _permuted(right, pivots), upper=False, unit=True)
        return _substituted(factors, lower, upper=True, unit=False)
    upper = _substituted(factors.mT, right, upper=False, unit=False)
    return _permuted(_substituted(factors.mT, upper, upper=True, unit=True), pivots, reverse=True)


def _no_errors(matrix: Tensor) -> Tensor:
    return matrix.new_zeros(matrix.shape[:-2], dtype=torch.int32)


def _as_factorised(matrix: Tensor) -> Tensor:
    """What PyTorch factorises to solve with `matrix`, or for its determinant; its derivatives rely on it."""
    return matrix.mT if matrix.is_contiguous() else matrix


def _lu_factor(matrix: Tensor, *, pivot: bool = True, check_errors: bool = False) -> Any:
    if not (pivot and _is_small(matrix) and matrix.shape[-1] == matrix.shape[-2]):
        return NotImplemented
    factors, pivots, _ = _factorised(matrix)
    return factors, pivots.to(torch.int32), _no_errors(matrix)


def _lu_unpack(factors: Tensor, pivots: Tensor, unpack_data: bool = True, unpack_pivots: bool = True) -> Any:
    if not (_is_small(factors) and factors.shape[-1] == factors.shape[-2]):
        return NotImplemented
    identity = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device).expand_as(factors)
    permutation = _permuted(identity, pivots).mT if unpack_pivots else factors.new_empty(0)
    return permutation, factors.tril(-1) + identity, factors.triu()


def _solve(matrix: Tensor, right: Tensor, *, left: bool = True, check_errors: bool = False) -> Any:
    if not _is_small(matrix):
        return NotImplemented
    is_vector = right.dim() == 1 or (right.dim() == matrix.dim() - 1 and right.shape == matrix.shape[:-1])
    factors, pivots, _ = _factorised(_as_factorised(matrix))
    columns = right.unsqueeze(-1) if is_vector else right
    transposed = matrix.is_contiguous()
    result = _lu_solve(factors, pivots, columns, left=left or is_vector, adjoint=transposed)
    return result.squeeze(-1) if is_vector else result, factors, pivots.to(torch.int32), _no_errors(matrix)


def _inverse(matrix: Tensor, *, check_errors: bool = False) -> Any:
    if not _is_small(matrix):
        return NotImplemented
    factors, pivots, _ = _factorised(matrix)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return _lu_solve(factors, pivots, identity.expand_as(matrix)), _no_errors(matrix)


def _determinant(matrix: Tensor) -> Any:
    if not _is_small(matrix):
        return NotImplemented
    factors, pivots, sign = _factorised(_as_factorised(matrix))
    result = sign
    for number in factors.diagonal(dim1=-2, dim2=-1).unbind(-1):
        result = result * number
    return result, factors, pivots.to(torch.int32)


def _log_determinant(matrix: Tensor) -> Any:
    if not _is_small(matrix):
        return NotImplemented
    factors, pivots, sign = _factorised(_as_factorised(matrix))
    logarithm = torch.zeros_like(sign)
    for number in factors.diagonal(dim1=-2, dim2=-1).unbind(-1):
        sign, logarithm = sign * number.sign(), logarithm + number.abs().log()
    return sign, logarithm, factors, pivots.to(torch.int32)


def _cholesky(matrix: Tensor, *, upper: bool = False, check_errors: bool = False) -> Any:
    if not _is_small(matrix):
        return NotImplemented
    rows, size = _rows(matrix.mT if upper else matrix), matrix.shape[-1]
    zero = torch.zeros_like(rows[0][0])
    factor = [[zero] * size for _ in range(size)]
    for column in range(size):
        for row in range(column, size):
            left = rows[row][column]
            for other in range(column):
                left = left - factor[row][other] * factor[column][other]
            factor[row][column] = left.sqrt() if row == column else left / factor[column][column]
    result = _matrix(factor)
    return result.mT if upper else result, _no_errors(matrix)


def _cholesky_solve(right: Tensor, factor: Tensor, upper: bool = False) -> Any:
    if not _is_small(factor):
        return NotImplemented
    lower = factor.mT if upper else factor
    inner = _triangular_solve(lower, right, upper=False)
    return _triangular_solve(lower.mT, inner, upper=True)


# --- convolutions -------------------------------------------------------------------------------------------------------


def _windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """`[N, C, *out, *kernel]` of `[N, C, *size]`: a view."""
    for dim, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(dim, gap * (size - 1) + 1, step)[..., ::gap]
    return x


def _padded(x: Tensor, padding: Sequence[int]) -> Tensor:
    return F.pad(x, [amount for size in reversed(padding) for amount in (size, size)]) if any(padding) else x


def _grouped(x: Tensor, groups: int, dim: int) -> Tensor:
    return x.unflatten(dim, (groups, -1))


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    """Sums over windows. `x` is `[N, C, *size]`, `weight` `[O, C / groups, *kernel]`."""
    spatial = weight.dim() - 2
    if transposed or x.dim() != spatial + 2:
        return NotImplemented
    windows = _grouped(_windows(_padded(x, padding), weight.shape[2:], stride, dilation), groups, 1)
    # [N, G, 1, C / G, *out, *kernel] times [G, O / G, C / G, *1, *kernel].
    weights = _grouped(weight, groups, 0)[(slice(None),) * 3 + (None,) * spatial]
    summed = [3, *range(4 + spatial, 4 + 2 * spatial)]
    result = (windows.unsqueeze(2) * weights).sum(summed).flatten(1, 2)
    return result if bias is None else result + bias.view(-1, *(1 for _ in range(spatial)))


def _convolution_backward(
    cotangent: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Any:
    spatial = weight.dim() - 2
    if transposed or x.dim() != spatial + 2:
        return NotImplemented
    of_x = of_weight = of_bias = None
    if output_mask[1]:
        windows = _grouped(_windows(_padded(x, padding), weight.shape[2:], stride, dilation), groups, 1).unsqueeze(2)
        rows = _grouped(cotangent, groups, 1).unsqueeze(3)[(..., *(None,) * spatial)]
        of_weight = (windows * rows).sum([0, *range(4, 4 + spatial)]).flatten(0, 1)
    if output_mask[0]:
        of_x = _convolution_backward_of_input(cotangent, x, weight, stride, padding, dilation, groups)
    if output_mask[2]:
        of_bias = cotangent.sum([0, *range(2, 2 + spatial)])
    return of_x, of_weight, of_bias


def _convolution_backward_of_input(
    cotangent: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The cotangent, with zeros between its numbers where the stride skips some, convolved with the reversed weights."""
    spatial = weight.dim() - 2
    spread = cotangent
    for dim, step in enumerate(stride, 2):
        if step > 1:
            sizes = list(spread.shape)
            sizes[dim] = (sizes[dim] - 1) * step + 1
            spread = torch.slice_scatter(spread.new_zeros(sizes), spread, dim, 0, None, step)
    pads = []
    for dim in reversed(range(2, 2 + spatial)):
        reach = dilation[dim - 2] * (weight.shape[dim] - 1)
        before = reach - padding[dim - 2]
        pads += [before, x.shape[dim] + reach - before - spread.shape[dim]]
    flipped = _grouped(weight.flip(list(range(2, 2 + spatial))), groups, 0).transpose(1, 2).flatten(0, 1)
    ones, zeros = [1] * spatial, [0] * spatial
    return _convolution(F.pad(spread, pads), flipped, None, ones, zeros, dilation, False, zeros, groups)


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
    aten.roll.default: _roll,
    aten.diag_embed.default: _diag_embed,
    aten.linalg_cross.default: _cross,
    aten.embedding.default: _embedding,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.cumsum.default: _running(torch.add),
    aten.cumprod.default: _running(torch.mul),
    aten.prod.default: lambda x, *, dtype=None: _product(x, dtype=dtype),
    aten.prod.dim_int: _product,
    aten.topk.default: _largest,
    aten.median.dim: _median,
    aten.kthvalue.default: _kth,
    aten._trilinear.default: _trilinear,
    aten.max.dim: _first_in_order(descending=True),
    aten.min.dim: _first_in_order(descending=False),
    aten.argmax.default: _place_of_first(descending=True),
    aten.argmin.default: _place_of_first(descending=False),
    aten.sort.default: _sorted,
    aten.sort.stable: _stably_sorted,
    aten.linalg_solve_triangular.default: _triangular_solve,
    aten.linalg_lu_factor_ex.default: _lu_factor,
    aten.linalg_lu_solve.default: _lu_solve,
    aten.lu_unpack.default: _lu_unpack,
    aten._linalg_solve_ex.default: _solve,
    aten.linalg_inv_ex.default: _inverse,
    aten._linalg_det.default: _determinant,
    aten._linalg_slogdet.default: _log_determinant,
    aten.linalg_cholesky_ex.default: _cholesky,
    aten.cholesky_solve.default: _cholesky_solve,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
}


def _all() -> dict[Any, Callable[..., Any]]:
    table = {**core_aten_decompositions(), **get_decompositions([getattr(aten, name) for name in _PYTORCHS])}
    kept = set(_KEPT)
    return {op: rule for op, rule in table.items() if op.name().split("::")[1].split(".")[0] not in kept} | _OWN


DECOMPOSITIONS = _all()
