"""`python -m benchmarks.stopping`: which rule gives up hopeless iterations, and no others.

Each chain is iterated once by each solver, up to its limit, and each rule is asked at every iteration whether it would
go on: so all rules judge the same iterations. A rule is wrong where it gives up what would have been solved within the
limit. What it goes on with although that never is, is wasted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import record
from benchmarks.solver_family import CHAINS, WIDTH, Model, Step
from pcr_fx.linear import solve_recurrence
from pcr_fx.solvers import linearisation
from pcr_fx.solvers.iteration import default_tolerance, relative_residuals
from pcr_fx.stopping import PATIENCE, PROGRESS, STALLED, Patience, rounding_level

LENGTHS = (128, 512)
# Factors of the weights: with small ones a chaotic chain forgets its past, and with large ones a contractive one does not.
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
DTYPES = (torch.float32, torch.float64)
SAMPLES = 2
CORRECTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "newton": solve_recurrence,
    "quasi-newton": lambda jacobians, residuals: solve_recurrence(
        jacobians.diagonal(dim1=-2, dim2=-1)[..., None, None], residuals.unsqueeze(-1)
    ).squeeze(-1),
    "picard": lambda _, residuals: residuals.cumsum(0),
    "jacobi": lambda _, residuals: residuals,
}


def expanding(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Residual blocks whose Jacobians' products grow without bound."""
    return z + torch.tanh(z @ weight + bias)


# --- iterations -------------------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """A solve that nobody gave up.

    Attributes:
        residuals: the largest relative residual at each iteration.
        reached: leading blocks within the tolerance, likewise.
        grows: whether the residual stalled after a correction with no digit that is right, likewise.
        is_solved: whether the last iteration was the solution.
    """

    solver: str
    length: int
    residuals: list[float] = field(default_factory=list)
    reached: list[int] = field(default_factory=list)
    grows: list[bool] = field(default_factory=list)
    is_solved: bool = False


def trace(solver: str, step: Step, initial: Tensor, weight: Tensor, bias: Tensor) -> Trace:
    """A solve from one sample `[d]`, until it is solved, not finite, or at the limit."""
    found, tolerance, eps = Trace(solver, len(weight)), default_tolerance(initial.dtype), torch.finfo(initial.dtype).eps
    evaluate, differentiate = torch.vmap(step), torch.vmap(torch.func.jacrev(step))
    states = initial.repeat(len(weight) + 1, 1)
    last, growth = math.inf, 0.0
    for _ in range(linearisation(solver).most + 1):
        previous, current = states[:-1], states[1:]
        residuals, jacobians = evaluate(previous, weight, bias) - current, differentiate(previous, weight, bias)
        ratios = relative_residuals(residuals, current.abs(), [WIDTH])
        terms = current.abs() + (jacobians.abs() @ previous.abs().unsqueeze(-1)).squeeze(-1)
        residual, against = float(ratios.max()), float(relative_residuals(residuals, terms, [WIDTH]).max())
        if not math.isfinite(residual):
            break
        stalled = residual > STALLED * last
        found.residuals.append(residual)
        found.reached.append(int((ratios <= tolerance).cumprod(0).sum()))
        found.grows.append(stalled and growth * eps > 1)
        by_terms = (stalled or last * last < tolerance) and against <= tolerance
        found.is_solved = residual <= tolerance or by_terms or (stalled and against <= rounding_level(initial.dtype))
        if found.is_solved:
            break
        correction = CORRECTIONS[solver](jacobians, residuals)
        growth, last = float(correction.abs().max() / residuals.abs().max()), residual
        states[1:] += correction
    return found


def traces() -> Iterator[Trace]:
    for step in (*CHAINS.values(), expanding):
        model = Model(step)
        for dtype, length, scale, sample in product(DTYPES, LENGTHS, SCALES, range(SAMPLES)):
            weight, bias = (tensor.detach()[-length:].to(dtype) for tensor in (scale * model.weight, model.bias))
            initial = torch.randn(WIDTH, generator=torch.Generator().manual_seed(sample)).to(dtype)
            for solver in CORRECTIONS:
                yield trace(solver, step, initial, weight, bias)


# --- rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """When to give up.

    Attributes:
        patience: iterations without progress.
        progress: the share of the residual that was progress last, below which another is.
        counts_blocks: whether enough solved blocks to end within the limit are progress.
        sees_growth: whether two corrections without a digit that is right are enough.
    """

    patience: int
    progress: float
    counts_blocks: bool
    sees_growth: bool = False

    def iterations(self, found: Trace) -> int:
        """Those before it gives up, or the solve ends by itself."""
        patience, limit, grown = Patience(self.patience, self.progress), linearisation(found.solver).most, 0
        every = zip(found.residuals, found.reached, found.grows, strict=True)
        for iteration, (residual, reached, grows) in enumerate(every):
            on_its_way = self.counts_blocks and iteration > 0 and reached * limit >= found.length * iteration
            is_over = patience.is_over(iteration, residual, on_its_way)
            grown = grown + 1 if grows else 0
            if is_over or (self.sees_growth and grown >= 2 and patience.progressed_at < iteration):
                return iteration
        return len(found.residuals) - 1


# "Smaller" at all, for a rule that compares with "at most".
SMALLER = math.nextafter(1.0, 0.0)
NAMED = {
    Rule(5, 0.5, True, True): "ops, formerly",
    Rule(8, SMALLER, False): "kernels, formerly",
    Rule(PATIENCE, PROGRESS, True): "ops",
    Rule(PATIENCE, PROGRESS, False): "kernels",
}
OTHERS = [Rule(*each, True) for each in product((5, 8, 12, 16), (0.5, 0.9, SMALLER))]


def row(rule: Rule, found: list[Trace]) -> list[Any]:
    """What a rule gives up wrongly and wastes, of each solver's."""
    cells: list[Any] = [NAMED.get(rule, ""), rule.patience, f"{rule.progress:g}", "yes" if rule.counts_blocks else ""]
    cells.append("yes" if rule.sees_growth else "")
    for solver in CORRECTIONS:
        counts = [(one, rule.iterations(one)) for one in found if one.solver == solver]
        wrong = sum(one.is_solved and count < len(one.residuals) - 1 for one, count in counts)
        wasted = [count for one, count in counts if not one.is_solved]
        cells.append(f"{wrong}, {sum(wasted) / len(wasted):.1f}")
    return cells


def main() -> None:
    with torch.no_grad():
        found = list(traces())
    solved = {solver: sum(one.is_solved for one in found if one.solver == solver) for solver in CORRECTIONS}
    each = len(found) // len(CORRECTIONS)
    record(
        "stopping",
        "When to give up an iteration",
        (
            "rule of",
            "iterations without progress",
            "progress below",
            "counts blocks",
            "sees growth",
            *(f"{solver} ({count} of {each} solvable)" for solver, count in solved.items()),
        ),
        [row(rule, found) for rule in dict.fromkeys((*NAMED, *OTHERS))],
        "For each solver: solves that were given up although they would have ended within the limit, and the mean of the "
        f"iterations spent on one that never does. The chains of `benchmarks/solver_family.py` and one that expands, {LENGTHS} "
        f"blocks, weights times {SCALES}, float32 and float64, {SAMPLES} samples. Progress is a residual below so much of the "
        "one that was progress last (1: any smaller one), or, where blocks are counted, enough of them within the tolerance "
        "to end within the limit. Growth is seen from two corrections in a row that are larger than their residual by more "
        "than the dtype has digits. Kernels are Newton's method only.",
    )


if __name__ == "__main__":
    main()
