"""The rule that `planning="estimated"` picks among the ways by, and what a user asked for.

Where the chain has a native kernel and its blocks are small, block by block in that kernel: there a block costs some
tens of nanoseconds. A reduction does d^2 times the work of a block, so that on a CPU it cannot be faster.

Otherwise Newton + cyclic reduction where the Jacobians are small, else block by block. What both cost was measured
on two CPU cores with PyTorch ops (blocks x + 0.1 W2 tanh(W1 x), float32, `benchmarks/solvers.py`):

- A block on its own costs some 20 us forward and 60 us backward, nearly all of it calling ops, whatever its size.
- A Newton iteration costs 0.4 ms and some 4 ns for each Jacobian entry, and there are three or four of them. So it pays
  in long chains with few entries a block.
- The backward needs a single reduction, and competes with three times the calls. So it pays far longer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from pcr_fx.planner.choice import Choice
from pcr_fx.ways import (
    Case,
    Fused,
    Iterative,
    Native,
    Reduction,
    Refused,
    Sequential,
    Way,
    block_by_block,
    by_iteration,
    by_reduction,
    in_units,
)

_Way = TypeVar("_Way", bound=Way)

# Jacobian entries of one block (samples x d x d) up to which a reduction beats the calls of the block's ops.
FORWARD_ENTRIES = 512
BACKWARD_ENTRIES = 4096
# Blocks below which the fixed cost of a reduction is not made up for.
FORWARD_LENGTH = 128
BACKWARD_LENGTH = 32
# On a GPU (an H200, float32). Where Newton's method is one launch (d <= 4) 1,024 blocks take it 15 to 25 us, and block by block 90
# to 250: it wins from here on, and until so many samples fill the GPU with slices.
GPU_NEWTON_LENGTH = 64
GPU_NEWTON_SAMPLES = 512
# Otherwise four launches an iteration cost a caller in Python more than going block by block forward (1.2 ms against 0.3 at
# d = 8), but not so for the one iteration of an adjoint: 62 us against 390 at d = 8, 366 against 2,900 at d = 64, up to so
# many Jacobian entries of one block.
GPU_NEWTON_ENTRIES = 4096


def estimated_choice(case: Case) -> Choice:
    """What the rule picks, or what the user asked for."""
    if case.options.solver != "auto":
        return asked_choice(case, case.options.solver)
    in_kernel = block_by_block(case)
    if isinstance(in_kernel, Fused):
        return _on_gpu(case, in_kernel)
    why_not = _why_not(case, in_kernel)
    if isinstance(in_kernel, Native) and not why_not:
        return Choice(in_kernel, in_kernel, _IN_ONE_KERNEL[in_kernel.kind])
    choice = _in_torch_ops(case)
    return replace(choice, reason=f"{why_not}; {choice.reason}")


_IN_ONE_KERNEL = {"native": "the whole chain runs as one native kernel", "fused": "in fused kernels"}


def _why_not(case: Case, in_kernel: Native | Fused | Refused) -> str:
    """Why the chain's kernel is not taken, or nothing."""
    if isinstance(in_kernel, Refused):
        return f"no kernel: {in_kernel.reason}"
    why = in_kernel.why_not_paying(case) if isinstance(in_kernel, Native) else ""
    return why and f"no kernel: {why}"


def asked_choice(case: Case, solver: str) -> Choice:
    """What the user named, forward; its adjoint by one reduction where that is affordable."""
    asked, in_kernel = f'asked for with solver="{solver}"', block_by_block(case)
    why_not = _why_not(case, in_kernel)
    sequential = Sequential() if why_not or isinstance(in_kernel, Refused) else in_kernel
    if solver == "sequential":
        reason = why_not or _IN_ONE_KERNEL[sequential.kind]
        return Choice(sequential, sequential, f"{asked}; {reason}", asked_for=True)
    forward, backward = _sound(case, by_iteration(case, solver)), _sound(case, by_reduction(case))
    reasons = [asked]
    for direction, way in (("forward", forward), ("backward", backward)):
        if isinstance(way, Refused):
            reasons.append(f"{direction} block by block: {way.reason}")
    there = sequential if isinstance(forward, Refused) else forward
    back = sequential if isinstance(backward, Refused) else backward
    for direction, taken in (("forward", there), ("backward", back)):
        if taken.window not in (None, case.options.window):
            fit = f"which fit into the memory limit of {in_units(case.limit)}"
            reasons.append(f"{direction} in windows of {taken.window}, {fit}")
    return Choice(there, back, "; ".join(reasons), asked_for=True)


def _sound(case: Case, way: _Way | Refused) -> _Way | Refused:
    """The way, unless it would not compute what the model does."""
    fault = "" if isinstance(way, Refused) else way.fault(case.program)
    return Refused(way.name, fault) if fault else way


def _on_gpu(case: Case, sequential: Fused) -> Choice:
    """Fused Newton where the GPU has room for all samples at once and the chain is long; else block by block."""
    length, samples, newton = case.program.length, case.samples, Fused.of(case, "newton")
    entries = samples * case.program.dimension**2
    if isinstance(newton, Refused):
        return Choice(sequential, sequential, f"fused kernels, block by block: {newton.reason}")
    if newton.is_one_launch:
        forward = backward = length >= GPU_NEWTON_LENGTH and samples <= GPU_NEWTON_SAMPLES
        most = f"both ways, for up to {GPU_NEWTON_SAMPLES} samples"
    else:
        forward, backward = False, length >= GPU_NEWTON_LENGTH and entries <= GPU_NEWTON_ENTRIES
        most = f"backward, for up to {GPU_NEWTON_ENTRIES} Jacobian entries a block"
    reason = (
        f"fused kernels; auto takes Newton from {GPU_NEWTON_LENGTH} blocks on {most} "
        f"({length} blocks, {samples} samples, {entries} entries)"
    )
    return Choice(newton if forward else sequential, newton if backward else sequential, reason)


def _in_torch_ops(case: Case) -> Choice:
    program = case.program
    dimension, length = program.dimension, program.length
    entries = case.samples * dimension**2
    size = f"{entries} Jacobian entries a block ({case.samples} samples x {dimension} x {dimension})"
    sequential, newton, reduction = Sequential(), Iterative.of(case, "newton"), Reduction.of(case)
    if isinstance(newton, Refused):
        return Choice(sequential, sequential, f"{size}; {newton.reason}")
    assert not isinstance(reduction, Refused), "its windows are those of Newton's method"
    forward = entries <= FORWARD_ENTRIES and length >= FORWARD_LENGTH
    backward = entries <= BACKWARD_ENTRIES and length >= BACKWARD_LENGTH
    reason = (
        f"{length} blocks, {size}; auto takes Newton forward up to {FORWARD_ENTRIES} entries from {FORWARD_LENGTH} "
        f"blocks on, backward up to {BACKWARD_ENTRIES} from {BACKWARD_LENGTH} on"
    )
    for wanted, way in ((forward, newton), (backward, reduction)):
        if wanted and (fault := way.fault(program)):
            return Choice(sequential, sequential, f"{size}; {fault}")
    return Choice(newton if forward else sequential, reduction if backward else sequential, reason)
