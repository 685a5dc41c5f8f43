"""What was chosen to run a chain, and what it was chosen from."""

from __future__ import annotations

from dataclasses import dataclass

from pcr_fx.ways import EAGER, Backward, Forward, Way

# Where blocks have tensors of their own: what every way but eager and native code needs first, and what every way but
# eager needs last.
STACKING = "stacking operands"
HANDING = "handing out gradients"
# And what a training step does with those tensors whatever runs the chain: as PyTorch's Adam does it by default, and fused.
ADAM, FUSED_ADAM = "Adam", "Adam, fused"
# What each comes on top of.
BESIDE = {STACKING: "for all but eager and native code both ways", HANDING: "for all but eager"}
# What is timed and no way: nothing competes with it.
NO_WAYS = (STACKING, HANDING, ADAM, FUSED_ADAM)

# What a solve node costs beside its solver, in seconds a call, more than a model's modules cost beside their ops. On a
# CPU, chains of 4 to 16 blocks: 4 us forward, 30 to 80 us in a training step.
NODE_SECONDS = {"forward": 5e-6, "backward": 5e-5}


@dataclass(frozen=True)
class Timing:
    """What one way costs.

    Attributes:
        way: its name; `EAGER` for the model's own ops under plain autograd.
        direction: "forward" or "backward".
        seconds: a call; `None` where it was not measured, for the reason in `note`.
        iterations: linear systems solved.
        skipped: whether it was not measured for want of time, and may be the fastest for all that is known.
        points: what was timed: (blocks, seconds), of all blocks or of two parts of them, which a line goes through.
        spread: how many times the least of its calls the median was.
        disturbed: whether something else was at work while it was timed, so that it may be faster than that.
        adding: seconds of a call where gradients are added to those that there are, where that was timed.
    """

    way: str
    direction: str
    seconds: float | None
    iterations: int = 0
    note: str = ""
    skipped: bool = False
    points: tuple[tuple[int, float], ...] = ()
    spread: float = 1.0
    disturbed: bool = False
    adding: float | None = None

    def __str__(self) -> str:
        if self.seconds is None:
            return f"{self.way}: {self.note}"
        rounds = f" ({self.iterations} iterations)" if self.iterations else ""
        note = "; ".join(filter(None, (self.note, "disturbed" if self.disturbed else "")))
        return f"{self.way} {1e3 * self.seconds:.3g} ms{rounds}" + (f" ({note})" if note else "")


@dataclass(frozen=True)
class Choice:
    """The way of each direction, and why.

    Attributes:
        asked_for: whether the user named the solver.
        timings: what was measured, if anything was.
        alone: whether the chain is best left as the model has it, by whether gradients are needed; as far as it was
            measured.
        samples: those that were measured.
        is_disturbed: whether that was on a busy machine, so that another way may be the fastest in peace.
    """

    forward: Forward
    backward: Backward
    reason: str
    asked_for: bool = False
    timings: tuple[Timing, ...] = ()
    alone: tuple[tuple[bool, bool], ...] = ()
    samples: int = 0
    is_disturbed: bool = False

    @property
    def has_failed(self) -> bool:
        """Whether one of its ways turned out not to be one."""
        return self.forward.failure is not None or self.backward.failure is not None

    def needed(self, needs_gradient: bool) -> tuple[Way, ...]:
        """The ways that a call takes."""
        return (self.forward, self.backward) if needs_gradient else (self.forward,)

    def is_in_place(self, needs_gradient: bool) -> bool:
        """Whether blocks' tensors are read where they lie: both ways, where gradients are needed."""
        return all(way.in_place for way in self.needed(needs_gradient))

    @property
    def gain(self) -> float:
        """How many times faster than the model's own ops a training call was measured; 1 where nothing was."""
        seconds = {(timing.way, timing.direction): timing.seconds for timing in self.timings}
        ours = [
            seconds.get((way.name, direction))
            for way, direction in ((self.forward, "forward"), (self.backward, "backward"))
        ]
        own = [seconds.get((EAGER, direction)) for direction in ("forward", "backward")]
        return sum(own) / sum(ours) if all(ours) and all(own) else 1.0  # type: ignore[arg-type]

    def leaves_alone(self, needs_gradient: bool) -> bool:
        """Whether a solve node has nothing to add: nobody asked for it, and the model's own ops do as well."""
        if self.asked_for:
            return False
        measured = dict(self.alone)
        if needs_gradient in measured:
            return measured[needs_gradient]
        return all(way.adds_nothing for way in self.needed(needs_gradient))
