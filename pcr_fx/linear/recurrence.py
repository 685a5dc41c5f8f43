"""Linear recurrences over blocks, solved sequentially or by cyclic reduction.

Both directions of a linearised chain are the same problem. Forward (the Newton update): delta_l = J_l delta_{l-1} + r_l.
Backward (the adjoint): lambda_l = g_l + J_{l+1}^T lambda_{l+1}, which is the forward recurrence with the blocks
reversed and transposed (DeepPCR, arXiv 2309.16318, sections 3.1 and 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pcr_fx.linear.algebra import Algebra, choose_algebra

# Below this many blocks a loop takes fewer steps than another level of reduction.
_SEQUENTIAL_LENGTH = 3


def solve_recurrence(matrices: Tensor, offsets: Tensor, method: str = "auto") -> Tensor:
    """Solve x_l = A_l x_{l-1} + b_l for l = 1..L with x_0 = 0.

    Args:
        matrices: A, `[L, *batch, d, d]`; `A_1` is not read.
        offsets: b, `[L, *batch, d]`, of the same dtype.
        method: one of `LINEAR_SOLVERS` or `"auto"`.

    Returns:
        x, `[L, *batch, d]`.
    """
    if offsets.numel() == 0:
        return torch.empty_like(offsets)
    algebra = choose_algebra(offsets)
    solution = LINEAR_SOLVERS[method](algebra, algebra.pack_matrices(matrices), algebra.pack_vectors(offsets))
    return algebra.unpack_vectors(solution, offsets.shape)


def solve_transposed(matrices: Tensor, cotangents: Tensor, method: str = "auto") -> Tensor:
    """Solve lambda_l = g_l + A_{l+1}^T lambda_{l+1} for l = L..1 with lambda_{L+1} = 0.

    Args:
        matrices: A, `[L, *batch, d, d]`; `A_1` is not read.
        cotangents: g, `[L, *batch, d]`.
        method: one of `LINEAR_SOLVERS` or `"auto"`.

    Returns:
        lambda, `[L, *batch, d]`.
    """
    length = matrices.shape[0]
    # Reversed block k takes A_{L-k}; block 0 is not read, and stays where it is.
    order = torch.arange(length, 0, -1, device=matrices.device) % max(length, 1)
    reversed_matrices = matrices.index_select(0, order).mT
    return solve_recurrence(reversed_matrices, cotangents.flip(0), method).flip(0)


def sequential_depth(length: int, method: str = "auto") -> int:
    """Steps that must follow one another to solve a recurrence of `length` blocks by `method`."""
    levels = math.ceil(math.log2(length)) if length > 1 else 1
    return {"sequential": length, "parallel_cyclic_reduction": levels}.get(method, min(length, 2 * levels))


def _sequential(algebra: Algebra, matrices: Tensor, offsets: Tensor) -> Tensor:
    states = [algebra.block(offsets, 0)]
    for index in range(1, algebra.length(offsets)):
        states.append(algebra.affine(algebra.block(matrices, index), states[-1], algebra.block(offsets, index)))
    return algebra.join(states)


def _cyclic_reduction(algebra: Algebra, matrices: Tensor, offsets: Tensor) -> Tensor:
    """Compose neighbouring blocks in pairs, solve the half-length chain, then fill in the other half.

    O(L d^3) work in 2 log2 L steps (odd-even reduction).
    """
    length = algebra.length(offsets)
    if length <= _SEQUENTIAL_LENGTH:
        return _sequential(algebra, matrices, offsets)
    paired = length // 2 * 2
    first, second = slice(0, paired, 2), slice(1, paired, 2)
    second_matrices = algebra.block(matrices, second)
    pair_matrices = algebra.multiply(second_matrices, algebra.block(matrices, first))
    pair_offsets = algebra.affine(second_matrices, algebra.block(offsets, first), algebra.block(offsets, second))
    solution = torch.empty_like(offsets)
    after_pairs = _cyclic_reduction(algebra, pair_matrices, pair_offsets)
    algebra.block(solution, second).copy_(after_pairs)
    algebra.block(solution, slice(0, 1)).copy_(algebra.block(offsets, slice(0, 1)))
    rest = slice(2, None, 2)
    count = (length - 1) // 2
    algebra.block(solution, rest).copy_(
        algebra.affine(
            algebra.block(matrices, rest),
            algebra.block(after_pairs, slice(0, count)),
            algebra.block(offsets, rest),
        )
    )
    return solution


def _parallel_cyclic_reduction(algebra: Algebra, matrices: Tensor, offsets: Tensor) -> Tensor:
    """Double the reach of every block at each step: O(L log L d^3) work in log2 L steps."""
    length, reach = algebra.length(offsets), 1
    while reach < length:
        later, earlier = slice(reach, None), slice(0, length - reach)
        later_matrices = algebra.block(matrices, later)
        longer = algebra.affine(later_matrices, algebra.block(offsets, earlier), algebra.block(offsets, later))
        offsets = algebra.join([algebra.block(offsets, slice(0, reach)), longer])
        if 2 * reach < length:
            products = algebra.multiply(later_matrices, algebra.block(matrices, earlier))
            matrices = algebra.join([algebra.block(matrices, slice(0, reach)), products])
        reach *= 2
    return offsets


LINEAR_SOLVERS: dict[str, Callable[[Algebra, Tensor, Tensor], Tensor]] = {
    "auto": _cyclic_reduction,
    "cyclic_reduction": _cyclic_reduction,
    "parallel_cyclic_reduction": _parallel_cyclic_reduction,
    "sequential": _sequential,
}
