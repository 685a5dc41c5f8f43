"""`python -m benchmarks.solvers`: what each solver costs over depth, width and batch.

The thresholds of `planning="estimated"` (`pcr_fx/planner/rule.py`) in PyTorch's ops are read off this grid.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import pcr_fx
from benchmarks.main_job import backward_ms
from benchmarks.measure import median_ms, record
from benchmarks.models import residual_net
from pcr_fx import ops
from pcr_fx.planner import Choice, Plan
from pcr_fx.planner.rule import estimated_choice
from pcr_fx.ways import Case

LENGTHS, WIDTHS, BATCHES = (16, 64, 256, 1024), (2, 4, 8, 16), (1, 8, 64)
# Jacobian entries of a whole chain; more would take minutes and teach nothing new.
MOST_ENTRIES = 2**23
REPEATS = 5
# Medians of five differ by as much on their own.
WORTH_SAYING = 1.2


@dataclass(frozen=True)
class Cost:
    """Milliseconds of one chain: the operators of a solve node, and eager PyTorch."""

    newton: float
    sequential: float
    eager: float

    @property
    def fastest(self) -> str:
        """The name of the smallest cost."""
        return min(("newton", "sequential", "eager"), key=lambda name: getattr(self, name))

    @property
    def cells(self) -> tuple[str, ...]:
        return f"{self.newton:.2f}", f"{self.sequential:.2f}", f"{self.eager:.2f}", f"{self.eager / self.newton:.1f}x"


def stacked_operands(model: nn.Sequential) -> list[Tensor]:
    """The per-block operands `[L, ...]` of a residual net, in the order that its blocks use them."""
    return [
        torch.stack([getattr(getattr(block, layer), name).detach() for block in model])
        for layer in ("inner", "outer")
        for name in ("weight", "bias")
    ]


def solver_costs(model: nn.Sequential, x: Tensor, solver: str) -> tuple[float, float, Plan]:
    """Forward and adjoint in milliseconds by one solver, and the plan that they ran by."""
    node: Any = pcr_fx.transform(model, x, {"solver": solver, "kernels": False}).report.chains[0].node
    operands = stacked_operands(model)
    plan, number = node.plan_for([x], operands, []), node.record.id
    with torch.no_grad():
        trajectory = ops.solve(x, operands, [], plan.key, number)
        cotangents = torch.zeros_like(trajectory)
        cotangents[-1] = 1.0
        forward = median_ms(lambda: ops.solve(x, operands, [], plan.key, number), REPEATS)
        backward = median_ms(
            lambda: ops.adjoint(x, trajectory, operands, [], cotangents, plan.key, number, []), REPEATS
        )
    fell_back = node.record.fallbacks + node.record.fallbacks_backward
    assert not fell_back, f"{solver} fell back {fell_back} times: its times are not its own"
    return forward, backward, plan


def rule_of(plan: Plan, batch: int) -> Choice:
    """What the rule takes where nobody asks for a solver, and nothing is printed."""
    options = pcr_fx.Options(kernels=False, planning="estimated")
    return estimated_choice(Case(plan.program, batch, "kernels=False asks for none", options))


def compare(length: int, width: int, batch: int) -> tuple[Any, ...]:
    """One row of the table."""
    model = residual_net(length, width)
    x = torch.randn(batch, width)
    newton_forward, newton_backward, plan = solver_costs(model, x, "newton")
    sequential_forward, sequential_backward, _ = solver_costs(model, x, "sequential")
    forward = Cost(newton_forward, sequential_forward, median_ms(lambda: model(x), REPEATS))
    backward = Cost(newton_backward, sequential_backward, backward_ms(model, x))
    choice = rule_of(plan, batch)
    # A chain that is sequential both ways stays as the model wrote it.
    taken = (
        ("eager", "eager")
        if choice.leaves_alone(needs_gradient=True)
        else (choice.forward.solver, choice.backward.solver)
    )
    return (
        length,
        width,
        batch,
        batch * width**2,
        *forward.cells,
        verdict(taken[0], forward),
        *backward.cells,
        verdict(taken[1], backward),
    )


def verdict(chosen: str, cost: Cost) -> str:
    """What the rule takes, and what it loses where another way is faster."""
    loss = getattr(cost, chosen) / getattr(cost, cost.fastest)
    return chosen if loss < WORTH_SAYING else f"{chosen} ({cost.fastest} is {loss:.1f}x faster)"


def main() -> None:
    grid = [
        (length, width, batch)
        for length, width, batch in itertools.product(LENGTHS, WIDTHS, BATCHES)
        if length * batch * width**2 <= MOST_ENTRIES
    ]
    each = ("Newton", "sequential", "eager", "eager / Newton", "the rule takes")
    record(
        "solvers",
        "Cost of a chain by each solver, in milliseconds",
        ("L", "w", "B", "entries a block", *(f"forward {c}" for c in each), *(f"backward {c}" for c in each)),
        [compare(*size) for size in grid],
        "Residual blocks, float32. Newton and sequential are the operators of a solve node by themselves, the backward with "
        "the gradients of all per-block operands, stacked; eager is PyTorch with autograd on, its backward with "
        "every parameter's gradient. Entries are those of a block's Jacobians, B w w.",
    )


if __name__ == "__main__":
    main()
