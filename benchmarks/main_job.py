"""`python -m benchmarks.main_job`: is it right, is Newton faster than eager, how long does a rewrite take."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pcr_fx
from benchmarks.measure import median_ms, record
from benchmarks.models import residual_net
from pcr_fx.ops import adjoint

NEWTON = {"solver": "newton"}


def values(model: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor) -> list[Tensor]:
    """The output, and the gradients of its square."""
    x = x.detach().requires_grad_()
    output = model(x)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), [x, *parameters])]


def worst(got: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """The largest relative error of the output, and of any gradient."""
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True)]
    return errors[0], max(errors[1:])


def accuracy() -> None:
    rows = []
    for length in (8, 64, 256, 1024):
        model, x = residual_net(length, 4).double(), torch.randn(3, 4, dtype=torch.float64)
        parameters = list(model.parameters())
        exact = values(model, parameters, x)
        double = worst(values(pcr_fx.transform(model, options=NEWTON), parameters, x), exact)
        single = copy.deepcopy(model).float()
        own = list(single.parameters())
        # The same float32 weights in float64 are what both float32 runs try to compute.
        rounded = copy.deepcopy(single).double()
        reference = values(rounded, list(rounded.parameters()), x.float().double())
        eager = worst(values(single, own, x.float()), reference)
        fast = worst(values(pcr_fx.transform(single, options=NEWTON), own, x.float()), reference)
        rows.append((length, *(f"{error:.1e}" for error in (*double, *fast, *eager))))
    record(
        "accuracy",
        "Error of Newton + cyclic reduction",
        (
            "L",
            "float64 output",
            "float64 gradients",
            "float32 output",
            "gradients",
            "eager float32 output",
            "gradients",
        ),
        rows,
        "Width 4, 3 samples. Largest error relative to the largest value, of the output and of any of the 4 L + 1 "
        "gradients. float64 against eager float64; float32, ours and eager's, against float64 with the same weights. "
        "Goals: float64 below 1e-9; float32 no worse than twice eager's.",
    )


def speed() -> None:
    rows = []
    for width in (1, 2, 4, 8):
        rows.append((width, *_speed(residual_net(1024, width), torch.randn(1, width))))
    record(
        "speed",
        "1024 residual blocks, one sample, float32: Newton against eager",
        (
            "w",
            "eager forward ms",
            "Newton forward ms",
            "ratio",
            "eager backward ms",
            "Newton backward solve ms",
            "ratio",
            "Newton whole backward ms",
            "ratio",
            "iterations",
        ),
        rows,
        "Medians of calls with gradients on, through `pcr_fx.transform`. The backward solve is all that the chain's "
        "adjoint needs: Jacobians, the transposed reduction, every block's gradients (stacked), and the check of the "
        "residual. The whole backward also hands 4,096 gradients to 4,096 parameters, which is most of it. "
        "Goals: forward at least 2x at w <= 4, backward solve at least 10x.",
    )


def _speed(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    fast = pcr_fx.transform(model, x, NEWTON)
    eager, newton = median_ms(lambda: model(x)), median_ms(lambda: fast(x))
    eager_back, newton_back = backward_ms(model, x), backward_ms(fast, x)
    solve = backward_solve_ms(fast, model, x)
    iterations = fast.report.to_dict()["chains"][0]["iterations"]
    return (
        f"{eager:.1f}",
        f"{newton:.1f}",
        f"{eager / newton:.1f}x",
        f"{eager_back:.1f}",
        f"{solve:.2f}",
        f"{eager_back / solve:.1f}x",
        f"{newton_back:.1f}",
        f"{eager_back / newton_back:.1f}x",
        str(iterations),
    )


def backward_ms(model: nn.Module, x: Tensor) -> float:
    """The median time of the backward alone."""
    times = []
    for _ in range(9):
        model.zero_grad()
        loss = model(x).sum()
        start = time.perf_counter()
        loss.backward()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[len(times) // 2]


def backward_solve_ms(fast: pcr_fx.TransformedModule, model: nn.Module, x: Tensor) -> float:
    """The chain's adjoint by itself, at the solution of `x`."""
    (entry,) = fast.report.chains
    node: Any = entry.node
    blocks = list(model)  # type: ignore[call-overload]
    operands = [
        torch.stack([getattr(getattr(block, layer), name).detach() for block in blocks])
        for layer in ("inner", "outer")
        for name in ("weight", "bias")
    ]
    plan = node.plan_for([x], operands, [])
    (trajectory,) = node([x], operands, [])
    cotangents = torch.zeros_like(trajectory).index_fill(0, torch.tensor([len(trajectory) - 1]), 1.0)
    with torch.no_grad():
        return median_ms(lambda: adjoint(x, trajectory, operands, [], cotangents, plan.key, node.record.id), repeats=21)


def rewriting() -> None:
    rows, x = [], torch.randn(2, 4)
    pcr_fx.transform(residual_net(8, 4), x, NEWTON)
    for length in (256, 1024, 4096):
        model = residual_net(length, 4)
        start = time.perf_counter()
        fast = pcr_fx.transform(model, options=NEWTON)
        without = time.perf_counter() - start
        start = time.perf_counter()
        fast(x)
        first = time.perf_counter() - start
        start = time.perf_counter()
        pcr_fx.transform(model, x, NEWTON)
        planned = time.perf_counter() - start
        rows.append((length, f"{without:.2f}", f"{first:.2f}", f"{planned:.2f}", f"{1e3 * planned / length:.2f}"))
    record(
        "rewriting",
        "Capture, detection and rewriting by `pcr_fx.transform`",
        ("L", "without inputs, s", "first call then, s", "with inputs, planned, s", "ms a block"),
        rows,
        "Goals: below 2 s at 1024 blocks, and linear in L.",
    )


if __name__ == "__main__":
    accuracy()
    speed()
    rewriting()
