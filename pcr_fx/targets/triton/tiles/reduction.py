"""Triton kernels of the linear systems delta_k = J_k delta_{k-1} + r_k, delta_{-1} = 0, one for each sample.

Columns k are solved in chunks. `compose` makes one affine map of each chunk, delta_before -> M delta_before + b, all
chunks at once. `apply` finds the delta before a chunk by going through the maps of those before it, and then goes through
the columns of the chunk. So the Jacobians are read twice and stored once, and there are as many products of matrices as
blocks. `decide` judges the iteration that the systems belong to. pcr_fx/linear solves the same systems in PyTorch's ops.

Layouts: residuals r `[samples, columns, d]`, jacobians `[samples, columns, d, d]`, maps `[samples, chunks - 1, d, d + 1]`
with b as the last column. The adjoint's matrices are the transposed Jacobians, read by columns. Column k is row k of the
states `[L, samples, d]`, and of the adjoints `[L + 1, samples, d]` row L - k. Samples with an outcome are left alone.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from pcr_fx.targets.triton.functions import decide_sample

# Columns of a map that one program makes, and those of a matrix that its products take at a time. The least that `tl.dot`
# takes, so that there are many programs: a GPU has room for them, while products of one program wait for each other.
SLICE = 16


def chunk_of(columns: int) -> int:
    """Columns of a chunk: about the root of how many there are.

    One after another there are the products of a chunk, as many steps of `apply` as there are chunks, and the steps of a
    chunk. That is least where both numbers are alike. The maps are then smaller than the Jacobians by the same factor.
    """
    return max(math.isqrt(max(columns - 1, 0)) + 1, 1)


@triton.jit(do_not_specialize=["columns", "samples", "iteration", "limit"])
def decide(
    ratios,
    stats,
    history,
    columns,
    samples,
    iteration,
    limit,
    tolerance,
    rounding: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each sample: judges its iteration from the ratios of all columns."""
    sample = tl.program_id(0).to(tl.int64)
    if tl.load(stats + sample * 3) < 0:
        decide_sample(ratios, stats, history, sample, columns, samples, iteration, limit, tolerance, rounding, BLOCK)


@triton.jit(do_not_specialize=["columns", "chunk", "chunks"])
def compose(
    jacobians,
    residuals,
    maps,
    stats,
    columns,
    chunk,
    chunks,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SLICE: tl.constexpr,
):
    """One program for each sample, chunk but the last, and slice of the columns of its map.

    At every step the map goes through memory, since a product takes its rows a slice at a time.
    """
    program = tl.program_id(0).to(tl.int64)
    parts = (D + SLICE) // SLICE
    part = program % parts
    number = program // parts % (chunks - 1)
    sample = program // parts // (chunks - 1)
    if tl.load(stats + sample * 3) >= 0:
        return
    # No correction comes before the first chunk, so that only the last column of its map is read.
    if (number == 0) & (part < parts - 1):
        return
    row = tl.arange(0, PADDED)[:, None]
    column = (part * SLICE + tl.arange(0, SLICE))[None, :]
    inner = tl.arange(0, SLICE)
    ours = (row < D) & (column <= D)
    here = maps + (sample * (chunks - 1) + number) * (D * (D + 1))
    result = tl.where(row == column, 1, 0).to(maps.dtype.element_ty)
    for index in range(number * chunk, (number + 1) * chunk):
        tl.store(here + row * (D + 1) + column, result, mask=ours)
        tl.debug_barrier()
        at = sample * columns + index
        residual = tl.load(residuals + at * D + row, mask=row < D, other=0)
        result = tl.where(column == D, residual, 0.0)
        for first in range(0, D, SLICE):
            across = (first + inner)[None, :]
            down = (first + inner)[:, None]
            # No correction comes before the first column, and its Jacobian was never computed.
            live = (row < D) & (across < D) & (row * 0 + index > 0)
            place = across * D + row if TRANSPOSED else row * D + across
            matrix = tl.load(jacobians + at * (D * D) + place, mask=live, other=0)
            before = tl.load(here + down * (D + 1) + column, mask=(down < D) & (column <= D), other=0)
            result = tl.dot(matrix, before, result, input_precision="ieee", out_dtype=maps.dtype.element_ty)
        tl.debug_barrier()
    tl.store(here + row * (D + 1) + column, result, mask=ours)


@triton.jit
def times(matrix, down, across, rows, vector, D: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr):
    """The product of a matrix in memory and a vector [PADDED], `WIDTH` columns of the matrix at a time.

    Args:
        down, across: the strides of the matrix.
        rows: of the matrix, beyond which it is zero.
    """
    row = tl.arange(0, PADDED)[:, None]
    part = tl.arange(0, PADDED // WIDTH)[:, None] * WIDTH
    parts = tl.reshape(vector, [PADDED // WIDTH, WIDTH])
    products = tl.zeros([PADDED, WIDTH], vector.dtype)
    for first in range(0, D, WIDTH):
        column = (first + tl.arange(0, WIDTH))[None, :]
        factor = tl.sum(tl.where(part == first, parts, 0), 0)
        entries = tl.load(matrix + row * down + column * across, mask=(row < rows) & (column < D), other=0)
        products += entries * factor[None, :]
    return tl.sum(products, 1)


@triton.jit(do_not_specialize=["columns", "samples", "chunk", "chunks"])
def apply(
    jacobians,
    residuals,
    maps,
    states,
    stats,
    columns,
    samples,
    chunk,
    chunks,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program for each sample and chunk: its corrections, added to its states.

    Where a tile of `WIDTH` columns is a whole matrix, the next column's is loaded while one is multiplied.
    """
    program = tl.program_id(0).to(tl.int64)
    number = program % chunks
    sample = program // chunks
    if tl.load(stats + sample * 3) >= 0:
        return
    place = tl.arange(0, PADDED)
    live = place < D
    row = place[:, None]
    across = place[None, :]
    square = (row < D) & (across < D)
    delta = tl.zeros([PADDED], states.dtype.element_ty)
    before = maps + sample * (chunks - 1) * (D * (D + 1))
    for index in range(0, number):
        here = before + index * (D * (D + 1))
        offset = tl.load(here + place * (D + 1) + D, mask=live, other=0)
        # Of the first chunk's map there is the last column only.
        rows = tl.where(index > 0, D, 0)
        delta = times(here, D + 1, 1, rows, delta, D, PADDED, WIDTH) + offset
    first = number * chunk
    last = tl.minimum(first + chunk, columns)
    ours = jacobians + sample * columns * (D * D)
    entry = across * D + row if TRANSPOSED else row * D + across
    if WIDTH == PADDED:
        matrix = tl.load(ours + first * (D * D) + entry, mask=square & (row * 0 + first > 0), other=0)
    for index in range(first, last):
        residual = tl.load(residuals + (sample * columns + index) * D + place, mask=live, other=0)
        if WIDTH == PADDED:
            ahead = square & (row * 0 + index + 1 < last)
            following = tl.load(ours + (index + 1) * (D * D) + entry, mask=ahead, other=0)
            delta = tl.sum(matrix * delta[None, :], 1) + residual
            matrix = following
        else:
            rows = tl.where(index > 0, D, 0)
            this = ours + index * (D * D)
            if TRANSPOSED:
                delta = times(this, 1, D, rows, delta, D, PADDED, WIDTH) + residual
            else:
                delta = times(this, D, 1, rows, delta, D, PADDED, WIDTH) + residual
        at = columns - 1 - index if TRANSPOSED else index
        state = states + (at * samples + sample) * D + place
        tl.store(state, tl.load(state, mask=live, other=0) + delta, mask=live)
