"""Factorisations of small matrices and what is solved by them, written out number by number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

# Rows of a matrix that is factorised.
_MAX_ROWS = 8


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


MATRIX_OPS: dict[Any, Callable[..., Any]] = {
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
}
