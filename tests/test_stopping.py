"""When an iteration ends: the rule as the solvers in PyTorch's ops keep it, and as Triton's kernels do."""

import math

import pytest
import torch
from gpu_chains import DEVICE

from pcr_fx.stopping import PATIENCE, STALLED, Outcome, Patience

# A rounding level above the tolerance, so that each is seen.
TOLERANCE, ROUNDING, LIMIT = 1e-6, 4e-6, 20


def ended_at(residuals: list[float], on_its_way: bool = False) -> int:
    """The iteration at which a solve with these residuals, the last one for ever, is given up."""
    patience = Patience()
    for iteration in range(10 * PATIENCE):
        if patience.is_over(iteration, residuals[min(iteration, len(residuals) - 1)], on_its_way):
            return iteration
    return 10 * PATIENCE


def test_patience_counts_from_the_last_progress() -> None:
    assert ended_at([1.0]) == PATIENCE
    assert ended_at([1.0, 2.0, 0.95]) == PATIENCE
    assert ended_at([1.0, 2.0, 0.89]) == 2 + PATIENCE
    assert ended_at([1.0, 0.5, 0.6, 0.46]) == 1 + PATIENCE


def test_slow_progress_is_progress() -> None:
    assert ended_at([0.98**i for i in range(10 * PATIENCE)]) == 10 * PATIENCE
    assert ended_at([0.9999**i for i in range(10 * PATIENCE)]) == PATIENCE


def test_solved_blocks_are_progress() -> None:
    assert ended_at([1.0], on_its_way=True) == 10 * PATIENCE


def test_failures_that_kernels_know_come_after_successes() -> None:
    known = [outcome for outcome in Outcome if outcome is not Outcome.SEQUENTIAL]
    assert all(outcome.success == (outcome.number <= Outcome.ROUNDING.number) for outcome in known)
    assert Outcome.SEQUENTIAL.number == len(known)


# --- the kernel that judges a sample's iteration ----------------------------------------------------------------------


def by_rule(residuals: list[float], terms: list[float]) -> tuple[Outcome, int]:
    """How and when a solve ends, in the words of `pcr_fx.stopping`, without counting blocks."""
    patience, last = Patience(), math.inf
    for iteration, (residual, against) in enumerate(zip(residuals, terms, strict=True)):
        stalled, is_over = residual > STALLED * last, patience.is_over(iteration, residual)
        if not math.isfinite(residual):
            return Outcome.NON_FINITE, iteration
        if residual <= TOLERANCE or ((stalled or last**2 < TOLERANCE) and against <= TOLERANCE):
            return Outcome.CONVERGED, iteration
        if stalled and against <= ROUNDING:
            return Outcome.ROUNDING, iteration
        if iteration >= LIMIT:
            return Outcome.ITERATION_LIMIT, iteration
        if is_over:
            return Outcome.STAGNATED, iteration
        last = residual
    raise AssertionError("the limit ends it")


def by_kernel(residuals: list[float], terms: list[float]) -> tuple[Outcome, int]:
    from pcr_fx.targets.triton.tiles.reduction import decide

    stats = torch.full((1, 3), -1.0, dtype=torch.float64, device=DEVICE)
    history = torch.full((1, 3), math.inf, dtype=torch.float64, device=DEVICE)
    for iteration, pair in enumerate(zip(residuals, terms, strict=True)):
        ratios = torch.tensor(pair, dtype=torch.float64, device=DEVICE)
        decide[(1,)](ratios, stats, history, 1, 1, iteration, LIMIT, TOLERANCE, rounding=ROUNDING, BLOCK=16)
    outcome, ended, _ = stats[0].tolist()
    return list(Outcome)[int(outcome)], int(ended)


@pytest.mark.parametrize(
    ("outcome", "residuals", "terms"),
    [
        (Outcome.CONVERGED, [1, 1e-2, 1e-7], [1, 1, 1]),
        (Outcome.CONVERGED, [1, 1e-4, 1e-5], [1, 1, 1e-7]),
        (Outcome.CONVERGED, [1, 0.9], [1, 1e-7]),
        (Outcome.ROUNDING, [1e-3, 1e-4, 9e-5], [1, 1e-2, 2e-6]),
        (Outcome.NON_FINITE, [1, math.inf], [1, 1]),
        (Outcome.STAGNATED, [1, 2, 0.95], [1, 1, 1]),
        (Outcome.ITERATION_LIMIT, [0.8**i for i in range(LIMIT)], [1] * LIMIT),
        (Outcome.ITERATION_LIMIT, [1, *([2] * (PATIENCE - 2)), 0.8], [1] * PATIENCE),
    ],
)
def test_a_kernel_judges_by_the_rule(outcome: Outcome, residuals: list[float], terms: list[float]) -> None:
    pytest.importorskip("triton")
    rest = LIMIT + 1 - len(residuals)
    residuals, terms = [*residuals, *([residuals[-1]] * rest)], [*terms, *([terms[-1]] * rest)]
    assert by_rule(residuals, terms)[0] is outcome
    assert by_kernel(residuals, terms) == by_rule(residuals, terms)
