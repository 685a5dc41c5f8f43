"""The backward pass of a chain: lambda_l = g_l + J_{l+1}^T lambda_{l+1}, then every operand's cotangent.

The system is linear, so one transposed reduction solves it and there is nothing to iterate (DeepPCR, arXiv 2309.16318,
section 3.3). The Jacobians are those at the returned trajectory, never an approximation of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pcr_fx.body import BATCHED_EPS, Program
from pcr_fx.call import Call
from pcr_fx.linear import solve_transposed
from pcr_fx.solvers.sequential import blocks
from pcr_fx.stopping import ADJOINT_EPS

# Above this many epsilons an adjoint's residual is refined: a loop over the blocks leaves about one.
_REFINED_EPS = 1.0


def adjoint_transposed(
    program: Program,
    call: Call,
    trajectory: Tensor,
    cotangents: Tensor,
    linear_solver: str,
    window: int | None = None,
) -> tuple[tuple[Tensor, ...], bool]:
    """Cotangents `(d_initial, *d_operands, *d_shared)` by one transposed reduction, or one a window of blocks.

    Args:
        trajectory: what the call was solved to, `[L, *batch, d]`.
        cotangents: g, of every state of the trajectory, `[L, *batch, d]`.
        window: blocks whose Jacobians are held at a time; `None` for all. Windows are solved from the last to the
            first, each handing its first adjoint to the one before: the result is the same.

    Returns:
        The cotangents, and whether the adjoint's own residual, measured with the blocks' pullback, is at rounding
        level, and that pullback is what a single block's is. A product of many expanding Jacobians can overflow where the
        adjoint itself does not.
    """
    previous, shared = previous_states(call, trajectory), call.shared
    length = call.length
    if window is None or window >= length:
        return _transposed(program, previous, call.operands, shared, cotangents, linear_solver)
    part, count = program.of_length(window), sum(program.differentiable_operands)
    carried, accurate = torch.zeros_like(cotangents[0]), True
    d_operands: list[tuple[Tensor, ...]] = []
    d_shared: list[Tensor] = []
    for end in range(length, 0, -window):
        begin = max(end - window, 0)
        # The first window may reach into the one behind it, where nothing is asked of it.
        covered, asked = slice(begin, begin + window), end - begin
        given = torch.zeros_like(cotangents[covered])
        given[:asked] = cotangents[begin:end]
        given[asked - 1] += carried
        every = call.window(begin, begin + window)
        (carried, *rest), good = _transposed(part, previous[covered], every, shared, given, linear_solver)
        accurate = accurate and good
        d_operands.append(tuple(gradient[:asked] for gradient in rest[:count]))
        sums = rest[count:]
        d_shared = [a + b for a, b in zip(d_shared, sums, strict=True)] if d_shared else sums
    joined = (torch.cat(parts[::-1]) for parts in zip(*d_operands, strict=True))
    return (carried, *joined, *d_shared), accurate


def _transposed(
    program: Program,
    previous: Tensor,
    operands: Sequence[Tensor],
    shared: Sequence[Tensor],
    cotangents: Tensor,
    linear_solver: str,
) -> tuple[tuple[Tensor, ...], bool]:
    jacobians = program.linearise(previous, *operands, *shared)[1]
    adjoints = solve_transposed(jacobians, cotangents, linear_solver)
    d_previous, *rest = program.pullback(previous, *operands, *shared, adjoints)
    residuals = _residuals(adjoints, cotangents, d_previous)
    if not _are_small(residuals, adjoints, _REFINED_EPS):
        # One step of iterative refinement: what the rounding of the reduction left over, solved for again.
        adjoints = adjoints + solve_transposed(jacobians, residuals, linear_solver)
        d_previous, *rest = program.pullback(previous, *operands, *shared, adjoints)
        residuals = _residuals(adjoints, cotangents, d_previous)
    accurate = _are_small(residuals, adjoints, ADJOINT_EPS)
    return (d_previous[0], *rest), accurate and _is_confirmed(program, previous, operands, shared, adjoints, d_previous)


def _is_confirmed(
    program: Program,
    previous: Tensor,
    operands: Sequence[Tensor],
    shared: Sequence[Tensor],
    adjoints: Tensor,
    d_previous: Tensor,
) -> bool:
    """Whether the pullback of one block by itself agrees with that of all, which is batched as their Jacobians are.

    Of the block with the largest cotangent. Where PyTorch batches an op wrongly, Jacobians and residuals agree with each other.
    """
    if not d_previous.numel():
        return True
    block = int(d_previous.abs().flatten(1).amax(1).argmax())
    each = [operand[block] for operand in operands]
    alone = program.step_pullback(previous[block], *each, *shared, adjoints[block])[0]
    size = alone.abs().amax()
    return bool((d_previous[block] - alone).abs().amax() <= BATCHED_EPS * torch.finfo(alone.dtype).eps * size)


def _residuals(adjoints: Tensor, cotangents: Tensor, d_previous: Tensor) -> Tensor:
    """g_l + J_{l+1}^T lambda_{l+1} - lambda_l, `[L, *batch, d]`."""
    residuals = cotangents - adjoints
    residuals[:-1] += d_previous[1:]
    return residuals


def _are_small(residuals: Tensor, adjoints: Tensor, limit: float) -> bool:
    """Whether the residuals are at most `limit` epsilons of the adjoints around them."""
    size = adjoints.abs().amax(-1) if adjoints.numel() else adjoints
    scale = torch.maximum(size, torch.cat([size[1:], size[-1:]]))
    finfo = torch.finfo(adjoints.dtype)
    small = (residuals.abs().amax(-1) if adjoints.numel() else residuals) <= limit * finfo.eps * scale + finfo.tiny
    # A comparison with NaN is false; infinities would pass it.
    return bool(small.all() & torch.isfinite(size).all())


def previous_states(call: Call, trajectory: Tensor) -> Tensor:
    """The state that each block starts from, `[L, *batch, d]`."""
    return torch.cat([call.initial.unsqueeze(0), trajectory[:-1]])


def adjoint_sequential(program: Program, call: Call, trajectory: Tensor, cotangents: Tensor) -> tuple[Tensor, ...]:
    """Cotangents `(d_initial, *d_operands, *d_shared)`, from the last block that `call` has to the first."""
    previous = previous_states(call, trajectory)
    each = blocks(call.operands, call.length)
    adjoint = torch.zeros_like(cotangents[0])
    d_operands: list[tuple[Tensor, ...]] = []
    d_shared: list[Tensor] | None = None
    count = sum(program.differentiable_operands)
    for index in range(call.length - 1, -1, -1):
        adjoint, *rest = program.step_pullback(previous[index], *each[index], *call.shared, adjoint + cotangents[index])
        d_operands.append(tuple(rest[:count]))
        parts = rest[count:]
        d_shared = parts if d_shared is None else [total + part for total, part in zip(d_shared, parts, strict=True)]
    stacked = (torch.stack(parts[::-1]) for parts in zip(*d_operands, strict=True))
    return (adjoint, *stacked, *(d_shared or ()))
