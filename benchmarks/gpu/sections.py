"""The parts of the bench: each yields its figures, to be measured one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from benchmarks.gpu.problem import Measured, Problem, Solved, eager, plain, residual, solved
from benchmarks.gpu.record import Row, Section
from benchmarks.gpu.sampling import Drawing
from benchmarks.gpu.subprocesses import inductor_times
from benchmarks.gpu.training import WIDTH, ours_and_eager

# Float64 goes block by block in eager.
LONGEST_EXACT = 4096
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    length: int = 1024
    widths: tuple[int, ...] = (2, 4, 8)
    samples: tuple[int, ...] = (1, 64)
    backward_widths: tuple[int, ...] = (2, 4, 8, 16)
    wide: tuple[int, ...] = (16, 32, 64)
    inductor_lengths: tuple[int, ...] = (128, 1024)
    batches: tuple[int, ...] = (32, 256)
    lengths: tuple[int, ...] = (256, 1024, 4096, 16384, 65536)
    grid_lengths: tuple[int, ...] = (1024, 256, 64)
    grid_widths: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    steps: int = 1000
    digits: int = 8
    training: int = 2000


FULL = Sizes()
TINY = Sizes(5, (2,), (1,), (1,), (2,), (3,), (2,), (3, 5), (3,), (1,), 2, 1, 1)


@dataclass(frozen=True)
class Budget:
    """Seconds in which figures may begin."""

    until: float

    @classmethod
    def of(cls, seconds: float) -> Budget:
        return cls(time.monotonic() + seconds)

    @property
    def left(self) -> float:
        return self.until - time.monotonic()


Figure = Callable[[], Row]
Figures = Callable[[Sizes, Budget], Iterator[Figure]]


def _name(problem: Problem, direction: str) -> str:
    samples, width = problem.x.shape
    return f"{direction}, L = {problem.length}, w = {width}, B = {samples}"


def compared(
    what: str, ours: Measured, theirs: Measured, goal: float | None = None, goal_us: float | None = None
) -> Row:
    return Row(
        what, ours.name, ours.us, ours.error, ours.iterations, theirs.name, theirs.us, theirs.error, goal, goal_us
    )


def against_eager(
    problem: Problem,
    direction: str,
    goal: float | None = None,
    goal_us: float | None = None,
    graph: bool = False,
) -> Row:
    ours = solved(problem, "auto", direction)
    return compared(_name(problem, direction), ours, eager(problem, direction, graph), goal, goal_us)


def against_sequential(problem: Problem, direction: str, goal: float | None = None) -> Row:
    exact = problem.length <= LONGEST_EXACT
    newton, sequential = (solved(problem, solver, direction, exact) for solver in ("newton", "sequential"))
    chosen = Solved(problem, "auto").described(direction)
    return compared(f"{_name(problem, direction)} (auto: {chosen})", newton, sequential, goal)


def headlines(sizes: Sizes, budget: Budget) -> Iterator[Figure]:
    problem = residual(sizes.length, 4, 1)
    yield partial(against_eager, problem, "forward", 100, 100)
    yield partial(against_eager, problem, "forward", 10, graph=True)
    yield partial(against_eager, problem, "backward", 400, 60)


def solvers_forward(sizes: Sizes, budget: Budget) -> Iterator[Figure]:
    for width in sizes.widths:
        for samples in sizes.samples:
            yield partial(against_sequential, residual(sizes.length, width, samples), "forward", 1.5)


def solvers_backward(sizes: Sizes, budget: Budget) -> Iterator[Figure]:
    for width in sizes.backward_widths:
        yield partial(against_sequential, residual(sizes.length, width, 1), "backward", 2)


def wide(sizes: Sizes, budget: Budget) -> Iterator[Figure]:
    for width in sizes.wide:
        problem = residual(sizes.length, width, 1)
        for direction in DIRECTIONS:
            yield partial(against_eager, problem, direction, 10)


def growth(sizes: Sizes, budget: Budget) -> Iterator[Figure]:
    for length in sizes.lengths:
        problem = residual(length, 4, 1)
        for direction in DIRECTIONS:
            yield partial(against_sequential, problem, direction)


def paper(sizes: Sizes, budget: Budget) -> Iterator[Figure]:
    for width in sizes.grid_widths:
        for length in sizes.grid_lengths:
            problem = plain(length, width)
            for direction in DIRECTIONS:
                yield partial(against_eager, problem, direction)


def training(sizes: Sizes, budget: Budget) -> Iterator[Figure]:
    # Compiling takes most of a minute: for one batch only.
    for ours, batches in (("packed", sizes.batches), ("compiled", sizes.batches[:1])):
        for batch in batches:
            what = f"training step, L = {sizes.length}, w = {WIDTH}, B = {batch}"
            yield lambda ours=ours, batch=batch, what=what: compared(  # type: ignore[misc]
                what, *ours_and_eager(ours, sizes.length, batch), goal=7
            )


def sampling(sizes: Sizes, budget: Budget) -> Iterator[Figure]:
    drawing = Drawing.of(sizes.steps, sizes.digits, sizes.training)
    for solver, goal in (("auto", 11), ("newton", None), ("picard", None), ("sequential", None)):
        for kind in drawing.inputs:
            what = f"{kind}, T = {sizes.steps}, B = {sizes.digits}: {solver}"
            yield lambda solver=solver, kind=kind, goal=goal, what=what: compared(  # type: ignore[misc]
                what, drawing.solved(solver, kind), drawing.eager(kind), goal
            )


def inductor(sizes: Sizes, budget: Budget) -> Iterator[Figure]:
    for length, theirs in inductor_times(4, sizes.inductor_lengths, budget.left - 10):
        yield partial(_against_inductor, residual(length, 4, 1), theirs)


def _against_inductor(problem: Problem, theirs: Measured | str) -> Row:
    ours, what = solved(problem, "auto", "forward"), _name(problem, "forward")
    if isinstance(theirs, str):
        return Row(what, ours.name, ours.us, ours.error, ours.iterations, theirs)
    return compared(what, ours, theirs, 10)


def verdict(section: Section) -> list[str]:
    """Whether the paper's own figures are beaten."""
    said = []
    for direction, goal in zip(DIRECTIONS, (30, 200), strict=True):
        best = max((row.gain or 0 for row in section.rows if row.what.startswith(direction)), default=0)
        said.append(
            f"The paper's {goal}x {direction}: {'beaten' if best > goal else 'NOT beaten'}, {best:.3g}x at most."
        )
    return said


def _silent(section: Section) -> list[str]:
    return []


@dataclass(frozen=True)
class Part:
    """One section: what it yields, how many seconds it may take, and what else there is to say of it."""

    title: str
    figures: Figures
    seconds: float
    note: str = ""
    summary: Callable[[Section], list[str]] = _silent


PARTS = {
    "headlines": Part("Forward and backward against eager", headlines, 40),
    "forward": Part(
        "Forward: Newton against block by block",
        solvers_forward,
        50,
        "Where Newton does not reach its goal, the choice of auto has to be sequential.",
    ),
    "backward": Part("Backward: reduction against block by block", solvers_backward, 50),
    "wide": Part("Wide states against eager", wide, 60),
    "training": Part(
        "Training step of residual blocks",
        training,
        70,
        "A step of Adam on the network of `examples/train_resnet.py`, called from Python, on data made at random: no "
        "time depends on what the data say. The error is that of the output before the first step.",
    ),
    "growth": Part(
        "Growth with the number of blocks",
        growth,
        30,
        f"Errors are measured up to {LONGEST_EXACT} blocks.",
    ),
    "paper": Part(
        "The paper's grid: plain MLP against eager",
        paper,
        70,
        "One sample, tanh, orthogonal weights, as in the paper's first experiment.",
        verdict,
    ),
    "sampling": Part(
        "Diffusion sampling",
        sampling,
        60,
        "The paper's figure is 11x. Digits drawn by the model and the loop of `examples/diffusion_digits.py`, called from "
        "Python; errors are those of pixels.",
    ),
    "inductor": Part('Forward against `torch.compile(mode="reduce-overhead")`', inductor, 90),
}
