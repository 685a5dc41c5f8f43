"""What Triton's language lacks, and what several kernels share; printed modules import all of it.

Functions of numbers that Triton's language lacks are libdevice's on a GPU, and PyTorch's in Triton's interpreter, which has
no libdevice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime.interpreter import TensorHandle

from pcr_fx import stopping
from pcr_fx.codegen.functions import FUNCTIONS, ScalarFunction
from pcr_fx.stopping import Outcome

# The rule of pcr_fx/stopping.py: its shares, and its outcomes by number.
STALLED = tl.constexpr(stopping.STALLED)
PROGRESS = tl.constexpr(stopping.PROGRESS)
PATIENCE = tl.constexpr(stopping.PATIENCE)
CONVERGED = tl.constexpr(Outcome.CONVERGED.number)
ROUNDING = tl.constexpr(Outcome.ROUNDING.number)
STAGNATED = tl.constexpr(Outcome.STAGNATED.number)
NON_FINITE = tl.constexpr(Outcome.NON_FINITE.number)
ITERATION_LIMIT = tl.constexpr(Outcome.ITERATION_LIMIT.number)

INTERPRETED = triton.knobs.runtime.interpret
_FROM_LIBRARY = [function for function in FUNCTIONS.values() if function.libdevice]


def _interpreted(function: ScalarFunction) -> Callable[..., Any]:
    """A function of the interpreter's tensors, which are NumPy's."""

    def call(*arguments: Any) -> Any:
        tensors = torch.broadcast_tensors(*(torch.from_numpy(np.asarray(a.handle.data)) for a in arguments))
        first = max(arguments, key=lambda argument: np.size(argument.handle.data))
        return tl.tensor(TensorHandle(function.twin(*tensors).numpy(), first.handle.dtype), first.type)

    return call


for _function in _FROM_LIBRARY:
    globals()[_function.name] = _interpreted(_function) if INTERPRETED else getattr(libdevice, str(_function.libdevice))


@triton.jit
def largest(x, axis: tl.constexpr):
    """The largest number along an axis; NaN if there is one, which `tl.max` loses."""
    is_nan = tl.max(tl.where(x == x, 0, 1), axis)
    return tl.where(is_nan > 0, float("nan"), tl.max(x, axis))


@triton.jit
def relative(residual, scale, floor: tl.constexpr):
    """A residual relative to a scale; infinite if either is not finite."""
    ratio = residual / tl.maximum(scale, floor)
    # A comparison with NaN is false, and nothing is small because a product overflowed.
    return tl.where((ratio < float("inf")) & (scale < float("inf")), ratio, float("inf"))


@triton.jit
def judge(
    residual,
    against,
    last,
    best,
    best_at,
    iteration,
    limit,
    tolerance,
    rounding: tl.constexpr,
):
    """Whether Newton's method is done, by the rule of pcr_fx/stopping.py.

    Args:
        residual, against: relative to the states, and to the terms that they are sums of.
        last: the residual before.
        best, best_at: the residual that was progress last, and the iteration it was found in.
        rounding: the rounding level of the dtype.

    Returns:
        The number of the outcome, -1 if there is none yet; the residual to report; best and best_at.
    """
    stalled = residual > last * STALLED
    converged = residual <= tolerance
    by_terms = (stalled | (last < tl.sqrt(tolerance))) & (against <= tolerance)
    improved = residual <= best * PROGRESS
    best_at = tl.where(improved, iteration, best_at)
    best = tl.where(improved, residual, best)
    outcome = tl.where(iteration - best_at >= PATIENCE, STAGNATED, -1)
    outcome = tl.where(iteration >= limit, ITERATION_LIMIT, outcome)
    outcome = tl.where(stalled & (against <= rounding), ROUNDING, outcome)
    outcome = tl.where(by_terms | converged, CONVERGED, outcome)
    outcome = tl.where(residual < float("inf"), outcome, NON_FINITE)
    residual = tl.where((outcome <= ROUNDING) & (outcome >= 0) & (residual > tolerance), against, residual)
    return outcome, residual, best, best_at


@triton.jit
def decide_sample(
    ratios,
    stats,
    history,
    sample,
    count,
    samples,
    iteration,
    limit,
    tolerance,
    rounding: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Judges a sample's iteration, and returns its outcome.

    Args:
        ratios: `[2, samples, count]`, the residuals of `count` columns, relative to what they compute and to the terms of that.
        stats: `[samples, 3]`, outcome (-1 while there is none), iteration and residual; of the sample they are written.
        history: `[samples, 3]`, the residual before, that which was progress last, and the iteration that had it; likewise.
    """
    lane = tl.arange(0, BLOCK)
    residuals = tl.zeros([BLOCK], stats.dtype.element_ty)
    againsts = tl.zeros([BLOCK], stats.dtype.element_ty)
    for first in range(0, count, BLOCK):
        place = ratios + sample * count + first + lane
        live = first + lane < count
        residuals = tl.maximum(residuals, tl.load(place, mask=live, other=0))
        againsts = tl.maximum(againsts, tl.load(place + samples.to(tl.int64) * count, mask=live, other=0))
    record = stats + sample * 3
    past = history + sample * 3
    residual = tl.max(residuals, 0)
    outcome, shown, best, best_at = judge(
        residual,
        tl.max(againsts, 0),
        tl.load(past),
        tl.load(past + 1),
        tl.load(past + 2),
        iteration,
        limit,
        tolerance,
        rounding,
    )
    tl.debug_barrier()  # every thread has read what one now writes
    tl.store(record, outcome.to(stats.dtype.element_ty))
    tl.store(record + 1, iteration.to(stats.dtype.element_ty))
    tl.store(record + 2, shown)
    tl.store(past, residual)
    tl.store(past + 1, best)
    tl.store(past + 2, best_at)
    return outcome


@triton.jit
def send(place, number, is_end: tl.constexpr, mask):
    """Send a number to another program, in words of 32 bits of it and a tag.

    A word that was not sent yet is 0, and tags are not: 1, or 2 where nothing follows. So the receiver sees of each word
    whether it is there, and it does not matter in which order they get there.
    """
    tag: tl.constexpr = (is_end + 1) * 2**32
    if number.dtype == tl.float32:
        bits = number.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        tl.atomic_xchg(place, bits | tag, mask=mask, sem="relaxed")
    else:
        bits = number.to(tl.int64, bitcast=True)
        tl.atomic_xchg(place, (bits & 0xFFFFFFFF) | tag, mask=mask, sem="relaxed")
        tl.atomic_xchg(place + 1, ((bits >> 32) & 0xFFFFFFFF) | tag, mask=mask, sem="relaxed")


@triton.jit
def float32_in(word):
    """The number that was sent."""
    return word.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def float64_in(low, high):
    """The number that was sent."""
    return ((high << 32) | (low & 0xFFFFFFFF)).to(tl.float64, bitcast=True)


@triton.jit
def ends_with(word):
    """Whether nothing follows."""
    return word >= 2 * 2**32


@triton.jit
def read2(place, mask):
    """Two neighbouring numbers in each lane, by one instruction where they are aligned; 0 where the mask is false."""
    places = place[:, None] + tl.arange(0, 2)[None, :]
    return tl.split(tl.load(places) if mask is None else tl.load(places, mask=mask[:, None], other=0))


@triton.jit
def read4(place, mask):
    """Four, likewise."""
    places = place[:, None] + tl.arange(0, 4)[None, :]
    numbers = tl.load(places) if mask is None else tl.load(places, mask=mask[:, None], other=0)
    even, odd = tl.split(tl.reshape(numbers, [place.shape[0], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def write2(place, first, second, mask):
    """Two neighbouring numbers in each lane, by one instruction where they are aligned."""
    tl.store(place[:, None] + tl.arange(0, 2)[None, :], tl.join(first, second), mask=mask[:, None])


@triton.jit
def write4(place, first, second, third, fourth, mask):
    """Four, likewise."""
    numbers = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [place.shape[0], 4])
    tl.store(place[:, None] + tl.arange(0, 4)[None, :], numbers, mask=mask[:, None])
