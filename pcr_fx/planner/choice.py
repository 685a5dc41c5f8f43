"""What was chosen to run a chain, and what it was chosen from."""

from __future__ import annotations

from dataclasses import dataclass, field

from pcr_fx.targets import CppKernel, TritonKernel


@dataclass(frozen=True)
class Way:
    """One way to go through a chain in one direction.

    Attributes:
        solver: "sequential" or an iterative solver; backward, where the adjoint is linear, "newton" is one transposed
            reduction.
        kernel: what runs it, where that is not PyTorch's ops.
        window: blocks whose linear systems are held at a time; `None` for the whole chain.
    """

    solver: str
    kernel: CppKernel | TritonKernel | None = field(default=None, repr=False)
    window: int | None = None

    @property
    def is_native(self) -> bool:
        """Whether native code goes block by block."""
        return isinstance(self.kernel, CppKernel) and self.solver == "sequential"

    @property
    def name(self) -> str:
        """As the report has it."""
        kernel = ""
        if self.kernel is not None:
            kernel = " (native kernel)" if isinstance(self.kernel, CppKernel) else " (fused kernel)"
        return self.solver + kernel + (f" in windows of {self.window}" if self.window else "")


EAGER = "eager"
# Where blocks have tensors of their own: what every way but eager and native code needs first, and what every way but
# eager needs last.
STACKING = "stacking operands"
HANDING = "handing out gradients"
# What each comes on top of.
BESIDE = {STACKING: "for all but eager and native code both ways", HANDING: "for all but eager"}


@dataclass(frozen=True)
class Timing:
    """What one way costs.

    Attributes:
        way: its name; `EAGER` for the model's own ops under plain autograd.
        direction: "forward" or "backward".
        seconds: a call; `None` where it was not measured, for the reason in `note`.
        iterations: linear systems solved.
        skipped: whether it was not measured for want of time, and may be the fastest for all that is known.
    """

    way: str
    direction: str
    seconds: float | None
    iterations: int = 0
    note: str = ""
    skipped: bool = False

    def __str__(self) -> str:
        if self.seconds is None:
            return f"{self.way}: {self.note}"
        rounds = f" ({self.iterations} iterations)" if self.iterations else ""
        return f"{self.way} {1e3 * self.seconds:.3g} ms{rounds}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Choice:
    """The way of each direction, and why.

    Attributes:
        asked_for: whether the user named the solver.
        timings: what was measured, if anything was.
        alone: whether the chain is best left as the model has it, by whether gradients are needed; as far as it was
            measured.
    """

    forward: Way
    backward: Way
    reason: str
    asked_for: bool = False
    timings: tuple[Timing, ...] = ()
    alone: tuple[tuple[bool, bool], ...] = ()

    def is_native(self, needs_gradient: bool) -> bool:
        """Whether the chain runs block by block in one native kernel: both ways, where gradients are needed."""
        ways = (self.forward, self.backward) if needs_gradient else (self.forward,)
        return all(way.is_native for way in ways)

    def leaves_alone(self, needs_gradient: bool) -> bool:
        """Whether a solve node has nothing to add: nobody asked for it, and the model's own ops do as well."""
        if self.asked_for:
            return False
        measured = dict(self.alone)
        if needs_gradient in measured:
            return measured[needs_gradient]
        ways = (self.forward, self.backward) if needs_gradient else (self.forward,)
        return all(way.solver == "sequential" and way.kernel is None for way in ways)
