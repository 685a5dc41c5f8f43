"""The rule that `solver="auto"` follows.

Where the chain has a native kernel and its blocks are small, block by block in that kernel: there a block costs some
tens of nanoseconds. A reduction does d^2 times the work of a block, so that on a CPU it cannot be faster.

Otherwise Newton + cyclic reduction where the Jacobians are small and affordable, else block by block. What both cost was measured
on two CPU cores with PyTorch ops (blocks x + 0.1 W2 tanh(W1 x), float32, `benchmarks/solvers.py`):

- A block on its own costs some 20 us forward and 60 us backward, nearly all of it calling ops, whatever its size.
- A Newton iteration costs 0.4 ms and some 4 ns for each Jacobian entry, and there are three or four of them. So it pays
  in long chains with few entries a block.
- The backward needs a single reduction, and competes with three times the calls. So it pays far longer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pcr_fx.body import Program
from pcr_fx.kernels import ChainKernel

# Jacobian entries of one block (samples x d x d) up to which a reduction beats the calls of the block's ops.
FORWARD_ENTRIES = 512
BACKWARD_ENTRIES = 4096
# Blocks below which the fixed cost of a reduction is not made up for.
FORWARD_LENGTH = 128
BACKWARD_LENGTH = 32
# Scalar operations of a block, over all samples, from which on PyTorch's own products gain more than its calls cost.
# Measured on one core, forward + backward against eager: 1.8 times faster at 0.26 million (w = 256, one sample), 1.7 at
# 0.53 (w = 128, 8 samples), equal at 1.05 (w = 512, one sample), 0.8 at 2.1 (w = 128, 32 samples), 0.4 at 8.4. The
# forward alone is faster in all of these, by 1.2 at the least.
KERNEL_OPERATIONS = 1_000_000
# Memory for the Jacobians of a whole chain; a reduction needs about as much again.
JACOBIAN_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Choice:
    """The solver of each direction (`"newton"` or `"sequential"`), and why.

    `kernel` runs what is sequential, and Newton's loop forward, where there is one.
    """

    forward: str
    backward: str
    reason: str
    asked_for: bool = False
    kernel: ChainKernel | None = None

    @property
    def is_native(self) -> bool:
        """Whether the chain runs block by block in one native kernel."""
        return self.kernel is not None and self.forward == self.backward == "sequential"

    def leaves_alone(self, needs_gradient: bool) -> bool:
        """Whether a solve node has nothing to add: nobody asked for it, and all that runs is block by block."""
        solvers = {self.forward, self.backward} if needs_gradient else {self.forward}
        return not self.asked_for and self.kernel is None and solvers == {"sequential"}


def choose(solver: str, program: Program, samples: int, kernel: ChainKernel | str) -> Choice:
    """The solvers for `samples` independent samples of a chain with `kernel`, or with none for the reason given."""
    asked = f'asked for with solver="{solver}"'
    native, why = _native(kernel, samples)
    if solver == "newton":
        usable = None if isinstance(kernel, str) or kernel.failure is not None else kernel
        return Choice(solver, solver, asked, asked_for=True, kernel=usable)
    if solver == "sequential":
        return Choice(solver, solver, f"{asked}; {why}", asked_for=True, kernel=native)
    if native is not None:
        return Choice("sequential", "sequential", why, kernel=native)
    choice = _in_torch_ops(program, samples)
    return replace(choice, reason=f"{why}; {choice.reason}")


def _native(kernel: ChainKernel | str, samples: int) -> tuple[ChainKernel | None, str]:
    """The kernel if it pays, and why it does or does not."""
    failure = kernel if isinstance(kernel, str) else kernel.failure
    if isinstance(kernel, str) or failure is not None:
        return None, f"no native kernel: {failure}"
    operations = max(samples, 1) * kernel.operations[0]
    if operations > KERNEL_OPERATIONS:
        return None, f"no native kernel: a block has {operations} scalar operations, more than {KERNEL_OPERATIONS}"
    return kernel, "the whole chain runs as one native kernel"


def _in_torch_ops(program: Program, samples: int) -> Choice:
    dimension, length = program.dimension, program.length
    entries = samples * dimension**2
    size = f"{entries} Jacobian entries a block ({samples} samples x {dimension} x {dimension})"
    needed = length * entries * program.dtype.itemsize
    if needed > JACOBIAN_BYTES:
        reason = f"{size}, {needed / 2**20:.0f} MiB in all; auto takes Newton up to {JACOBIAN_BYTES >> 20} MiB"
        return Choice("sequential", "sequential", reason)
    forward = entries <= FORWARD_ENTRIES and length >= FORWARD_LENGTH
    backward = entries <= BACKWARD_ENTRIES and length >= BACKWARD_LENGTH
    reason = (
        f"{length} blocks, {size}; auto takes Newton forward up to {FORWARD_ENTRIES} entries from {FORWARD_LENGTH} "
        f"blocks on, backward up to {BACKWARD_ENTRIES} from {BACKWARD_LENGTH} on"
    )
    return Choice(_name(forward), _name(backward), reason)


def _name(newton: bool) -> str:
    return "newton" if newton else "sequential"
