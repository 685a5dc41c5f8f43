"""The ways that a chain can be gone through, and the rule that `planning="estimated"` picks among them by.

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

from dataclasses import dataclass, replace

import torch

from pcr_fx.body import Program
from pcr_fx.options import Options
from pcr_fx.planner.choice import Choice, Way
from pcr_fx.planner.memory import MIN_WINDOW, fitting_window, in_units, memory_limit
from pcr_fx.solvers import DEFAULT_MAX_ITERATIONS, ITERATIVE_SOLVERS
from pcr_fx.targets import CppKernel, TritonKernel

# Jacobian entries of one block (samples x d x d) up to which a reduction beats the calls of the block's ops.
FORWARD_ENTRIES = 512
BACKWARD_ENTRIES = 4096
# Blocks below which the fixed cost of a reduction is not made up for.
FORWARD_LENGTH = 128
BACKWARD_LENGTH = 32
# Scalar operations of a block, over all samples, from which on PyTorch's own products gain more than its calls cost where
# a kernel's lanes are features: each sample then goes through all weights. Measured on two cores, forward + backward
# against eager, w = 256..1024, one sample: 1.1 times faster at 0.26 million, 1.4 at 1.05, 0.8 at 4.2. Where lanes are samples,
# kernels were 1.1 to 2.8 times faster at up to 540 million (w = 128..740, 8..512 samples). There threads share the vectors;
# PyTorch's share a product, and so gain where there is a vector for less than every other thread.
KERNEL_OPERATIONS = 1_000_000
THREADS_A_VECTOR = 2
# And from which on it is not worth compiling one to see.
KERNEL_OPERATIONS_MEASURED = 8_000_000
# On a GPU (an H200, float32). Where Newton's method is one launch (d <= 4) 1,024 blocks take it 15 to 25 us, and block by block 90
# to 250: it wins from here on, and until so many samples fill the GPU with slices.
GPU_NEWTON_LENGTH = 64
GPU_NEWTON_SAMPLES = 512
# Otherwise four launches an iteration cost a caller in Python more than going block by block forward (1.2 ms against 0.3 at
# d = 8), but not so for the one iteration of an adjoint: 62 us against 390 at d = 8, 366 against 2,900 at d = 64, up to so
# many Jacobian entries of one block.
GPU_NEWTON_ENTRIES = 4096
# Memory that is taken without asking how much is free, which takes a while.
BYTES_UNASKED = 2**26


@dataclass(frozen=True)
class Case:
    """What is to be planned: a chain's program for so many independent samples.

    Attributes:
        kernel: the chain's kernel, or why it has none.
    """

    program: Program
    samples: int
    kernel: CppKernel | TritonKernel | str
    options: Options

    @property
    def usable_kernel(self) -> CppKernel | TritonKernel | None:
        """The kernel, if there is one, it could be compiled, and memory has room for it."""
        return None if isinstance(self.kernel, str) or self.why_no_kernel else self.kernel

    @property
    def why_no_kernel(self) -> str:
        """Why there is no kernel to use, or nothing."""
        if isinstance(self.kernel, str):
            return self.kernel
        if self.kernel.failure is not None:
            return self.kernel.failure
        needed = self.kernel.scratch_bytes(self.samples) if isinstance(self.kernel, TritonKernel) else 0
        if needed > BYTES_UNASKED and needed > self.limit:
            return f"fused kernels need {in_units(needed)}, and the memory limit is {in_units(self.limit)}"
        return ""

    @property
    def limit(self) -> int:
        """Bytes that linear systems may take."""
        return memory_limit(self.options.memory_limit, self.program.signature.states[0].device)

    def iterative(self, solver: str) -> Way | str:
        """The way forward by an iterative solver, or why there is none."""
        kernel = self.usable_kernel
        if isinstance(kernel, TritonKernel) and solver == "newton" and self._is_plain:
            needed = kernel.scratch_bytes(self.samples, self.options.max_iterations or DEFAULT_MAX_ITERATIONS[solver])
            if needed <= BYTES_UNASKED or needed <= self.limit:
                return Way(solver, kernel)
        window = fitting_window(solver, self.program, self.samples, self.limit, self.options.window)
        if window is None:
            return f"a window of {MIN_WINDOW} blocks would not fit into the memory limit, {in_units(self.limit)}"
        native = kernel if isinstance(kernel, CppKernel) and solver == "newton" and self._is_plain else None
        return Way(solver, native, None if window == self.program.length else window)

    @property
    def _is_plain(self) -> bool:
        """Whether nothing is asked of Newton's method that kernels do not do."""
        options = self.options
        return (options.damping, options.window, options.start, options.linear_solver) == (1.0, None, "repeat", "auto")

    @property
    def fallback_kernel(self) -> CppKernel | None:
        """The native kernel that goes block by block where an iteration failed, if it pays."""
        kernel = self.usable_kernel
        if not isinstance(kernel, CppKernel):
            return None
        threads = THREADS_A_VECTOR * kernel.vectors(self.samples)
        pays = self.operations(kernel) <= KERNEL_OPERATIONS or threads >= torch.get_num_threads()
        return kernel if pays else None

    def operations(self, kernel: CppKernel) -> int:
        """Scalar operations of a block, over all samples."""
        return max(self.samples, 1) * kernel.operations[0]

    def reduction(self) -> Way | str:
        """The way back by transposed reductions, or why there is none."""
        way = self.iterative("newton")
        if isinstance(way, Way) and isinstance(way.kernel, CppKernel):
            return replace(way, kernel=None)  # it has no backward of its own
        return way


def estimated_choice(case: Case) -> Choice:
    """What the rule picks, or what the user asked for."""
    solver = case.options.solver
    if solver != "auto":
        return asked_choice(case, solver)
    if isinstance(case.usable_kernel, TritonKernel):
        return _on_gpu(case, case.usable_kernel)
    native, why = _native(case)
    if native is not None:
        way = Way("sequential", native)
        return Choice(way, way, why)
    choice = _in_torch_ops(case)
    return replace(choice, reason=f"{why}; {choice.reason}")


def asked_choice(case: Case, solver: str) -> Choice:
    """What the user named, forward; its adjoint by one reduction where that is affordable."""
    asked, kernel, why = f'asked for with solver="{solver}"', case.usable_kernel, case.why_no_kernel
    if not isinstance(kernel, TritonKernel):
        kernel, why = _native(case)
    sequential = Way("sequential", kernel)
    if solver == "sequential":
        return Choice(sequential, sequential, f"{asked}; {_kernel_words(kernel) or why}", asked_for=True)
    forward, backward = case.iterative(solver), case.reduction()
    reasons = [asked]
    if isinstance(forward, str):
        reasons.append(f"forward block by block: {forward}")
    if isinstance(backward, str):
        reasons.append(f"backward block by block: {backward}")
    there, back = (sequential if isinstance(way, str) else way for way in (forward, backward))
    for direction, way in (("forward", there), ("backward", back)):
        if way.window not in (None, case.options.window):
            fit = f"which fit into the memory limit of {in_units(case.limit)}"
            reasons.append(f"{direction} in windows of {way.window}, {fit}")
    return Choice(there, back, "; ".join(reasons), asked_for=True)


def _kernel_words(kernel: CppKernel | TritonKernel | None) -> str:
    if kernel is None:
        return ""
    native = isinstance(kernel, CppKernel)
    return "the whole chain runs as one native kernel" if native else "in fused kernels"


def _on_gpu(case: Case, kernel: TritonKernel) -> Choice:
    """Fused Newton where the GPU has room for all samples at once and the chain is long; else block by block."""
    length, samples, newton = case.program.length, case.samples, case.iterative("newton")
    sequential, entries = Way("sequential", kernel), samples * case.program.dimension**2
    if isinstance(newton, str) or newton.kernel is not kernel:
        reason = "fused kernels, block by block: Newton's method takes more memory there, or not these options"
        return Choice(sequential, sequential, reason)
    if kernel.is_one_launch:
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


def _native(case: Case) -> tuple[CppKernel | None, str]:
    """The kernel if it pays, and why it does or does not."""
    kernel = case.usable_kernel
    if not isinstance(kernel, CppKernel):
        return None, f"no kernel: {case.why_no_kernel}"
    if case.fallback_kernel is None:
        few = f"{kernel.vectors(case.samples)} vectors of samples do not feed {torch.get_num_threads()} threads"
        why = kernel.why_features("adjoint", case.samples) or few
        return None, f"no kernel: a block has {case.operations(kernel)} scalar operations, and {why}"
    return kernel, _kernel_words(kernel)


def _in_torch_ops(case: Case) -> Choice:
    program = case.program
    dimension, length = program.dimension, program.length
    entries = case.samples * dimension**2
    size = f"{entries} Jacobian entries a block ({case.samples} samples x {dimension} x {dimension})"
    sequential, newton = Way("sequential"), case.reduction()
    if isinstance(newton, str):
        return Choice(sequential, sequential, f"{size}; {newton}")
    forward = entries <= FORWARD_ENTRIES and length >= FORWARD_LENGTH
    backward = entries <= BACKWARD_ENTRIES and length >= BACKWARD_LENGTH
    reason = (
        f"{length} blocks, {size}; auto takes Newton forward up to {FORWARD_ENTRIES} entries from {FORWARD_LENGTH} "
        f"blocks on, backward up to {BACKWARD_ENTRIES} from {BACKWARD_LENGTH} on"
    )
    return Choice(newton if forward else sequential, newton if backward else sequential, reason)


def candidates(case: Case, direction: str) -> tuple[list[Way], dict[str, str]]:
    """The ways that there are, and by name why others are none."""
    ways, refused, kernel = [], {}, case.usable_kernel
    operations, why = 0, ""
    if isinstance(kernel, CppKernel):
        operations = case.operations(kernel)
        why = kernel.why_features("forward" if direction == "forward" else "adjoint", case.samples)
    if kernel is None:
        refused[_in_kernel(case.kernel)] = case.why_no_kernel
    elif operations > KERNEL_OPERATIONS_MEASURED and why:
        refused[_in_kernel(kernel)] = f"a block has {operations} scalar operations, and {why}"
    else:
        ways.append(Way("sequential", kernel))
    ways.append(Way("sequential"))
    for solver in ITERATIVE_SOLVERS if direction == "forward" else ("newton",):
        way = case.iterative(solver) if direction == "forward" else case.reduction()
        if isinstance(way, str):
            refused[solver] = way
        elif isinstance(way.kernel, CppKernel):
            refused[way.name] = "many times the arithmetic of block by block, and a CPU has no idle lanes for it"
        elif isinstance(kernel, TritonKernel) and way.kernel is None:
            refused[way.name] = "it waits for the GPU at every iteration, which fused kernels do not"
        else:
            ways.append(way)
    return ways, refused


def _in_kernel(kernel: CppKernel | TritonKernel | str) -> str:
    return "sequential (fused kernel)" if isinstance(kernel, TritonKernel) else "sequential (native kernel)"
