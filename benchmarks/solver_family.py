"""`python -m benchmarks.solver_family`: every solver on five kinds of chain, starts on real training, a hopeless case."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pcr_fx
from benchmarks.measure import median_ms, record
from benchmarks.models import classifier

LENGTH, WIDTH, BATCH = 512, 8, 4
REPEATS = 7
Step = Callable[[Tensor, Tensor, Tensor], Tensor]
IN_OPS: dict[str, Any] = {"kernels": False}
WAYS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "auto": {},
    "sequential (ops)": {**IN_OPS, "solver": "sequential"},
    "newton": {**IN_OPS, "solver": "newton"},
    "newton, windows of 64": {**IN_OPS, "solver": "newton", "window": 64},
    "newton, damped by 0.7": {**IN_OPS, "solver": "newton", "damping": 0.7},
    "quasi-newton": {**IN_OPS, "solver": "quasi-newton"},
    "picard": {**IN_OPS, "solver": "picard"},
    "jacobi": {**IN_OPS, "solver": "jacobi"},
}


def contractive(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Forgets its past at a rate of 0.5 a block."""
    return 0.5 * torch.tanh(z @ weight + bias)


def near_identity(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """An Euler step of 1 / L of a differential equation."""
    return z + torch.tanh(z @ weight + bias) / LENGTH


def chaotic(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A random network with a gain of 2.5, chaotic from 1 on (Sompolinsky et al., Phys. Rev. Lett. 61, 259, 1988)."""
    return torch.tanh(2.5 * (z @ weight) + bias)


def stiff(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Euler steps of a relaxation at rates from 0.001 to 1.9 a step; 2 would be unstable."""
    rates = torch.logspace(-3, math.log10(1.9), z.shape[-1], dtype=z.dtype)
    return z - rates * (z - 0.2 * torch.tanh(z @ weight + bias))


def kinked(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Residual ReLU blocks, whose Jacobians jump."""
    return z + 0.1 * torch.relu(z @ weight + bias)


CHAINS: dict[str, Step] = {
    "contractive": contractive,
    "near identity": near_identity,
    "chaotic": chaotic,
    "stiff": stiff,
    "ReLU": kinked,
}


class Model(nn.Module):
    """One chain, with orthogonal weights, the same for all blocks only in size."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step = step
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(LENGTH, WIDTH, WIDTH))[0].contiguous())
        self.bias = nn.Parameter(0.3 * torch.randn(LENGTH, WIDTH))

    def forward(self, z: Tensor) -> Tensor:
        for weight, bias in zip(self.weight.unbind(0), self.bias.unbind(0), strict=True):
            z = self.step(z, weight, bias)
        return z


def gradients(model: nn.Module, x: Tensor) -> Tensor:
    """The gradient of the sum of squares with respect to everything, as one vector."""
    x = x.detach().requires_grad_()
    found = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    return torch.cat([gradient.flatten() for gradient in found]).double()


def error(got: Tensor, exact: Tensor) -> str:
    return f"{float((got - exact).abs().max() / exact.abs().max()):.0e}"


def without_gradients(model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return model(x)

    return call


def family() -> list[tuple[Any, ...]]:
    """A row for each chain and way."""
    rows = []
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1))
    for kind, step in CHAINS.items():
        model = Model(step)
        exact = gradients(copy.deepcopy(model).double(), x.double())
        for name, options in WAYS.items():
            fast: Any = model if options is None else pcr_fx.transform(copy.deepcopy(model), x, options)
            first = without_gradients(fast, x)
            first()
            chain = {} if options is None else fast.report.to_dict()["chains"][0]
            forward = median_ms(first, REPEATS)
            both = median_ms(lambda fast=fast: gradients(fast, x), REPEATS)
            far = error(gradients(fast, x), exact)
            ended = chain.get("fallback_reason") or chain.get("outcome") or "the loop"
            solved = bool(chain) and chain["iterations"] and not chain["fallback_reason"]
            residual = f"{chain['residual']:.0e}" if solved else ""
            iterations = chain["iterations"] if chain and chain["iterations"] else ""
            rows.append((kind, name, iterations, residual, ended, f"{forward:.2f}", f"{both:.2f}", far))
            print(*rows[-1], sep=" | ", flush=True)
    return rows


def starts() -> list[tuple[Any, ...]]:
    """Newton's iterations and time in a training on scikit-learn's digits, from each start."""
    images, labels = load_digits(return_X_y=True)
    data, target = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    rows = []
    for length in (128, 1024):
        for start in ("repeat", "previous", "picard"):
            fast = pcr_fx.transform(
                classifier(length, WIDTH), data[:32], {**IN_OPS, "solver": "newton", "start": start}
            )
            optimiser = torch.optim.Adam(fast.parameters(), lr=3e-3)
            iterations, seconds = [], []
            generator = torch.Generator().manual_seed(0)
            for _ in range(30):
                chosen = torch.randint(len(data), (32,), generator=generator)
                began = time.perf_counter()
                loss = nn.functional.cross_entropy(fast(data[chosen]), target[chosen])
                seconds.append(time.perf_counter() - began)
                iterations.append(fast.report.to_dict()["chains"][0]["iterations"])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            median = 1e3 * sorted(seconds)[len(seconds) // 2]
            mean = sum(iterations) / len(iterations)
            # The same batch again, as in full-batch training or a solver within a solver.
            with torch.no_grad():
                fast(data[:32])
                fast(data[:32])
            again = fast.report.to_dict()["chains"][0]["iterations"]
            rows.append((length, start, f"{mean:.1f}", f"{median:.1f}", again))
    return rows


def hopeless() -> list[tuple[Any, ...]]:
    """What it costs to ask for a solver that cannot solve the chain."""
    x, rows = torch.randn(BATCH, WIDTH), []
    block_by_block = pcr_fx.transform(Model(chaotic), x, {**IN_OPS, "solver": "sequential"})
    alone = median_ms(without_gradients(block_by_block, x), REPEATS)
    for name in ("newton", "quasi-newton", "picard", "jacobi"):
        fast: Any = pcr_fx.transform(Model(chaotic), x, {**IN_OPS, "solver": name})
        times, reason = [], ""
        with torch.no_grad():
            for _ in range(200):
                began = time.perf_counter()
                fast(x)
                times.append(1e3 * (time.perf_counter() - began))
                reason = reason or fast.report.to_dict()["chains"][0]["fallback_reason"]
        chain = fast.report.to_dict()["chains"][0]
        mean = sum(times[1:]) / len(times[1:])
        tried = chain["fallbacks"]
        rows.append((name, reason, tried, f"{times[16]:.1f}", f"{alone:.1f}", f"{mean / alone:.2f}x"))
    return rows


def main() -> None:
    record(
        "solver_family",
        "Every solver on five kinds of chain, float32",
        (
            "chain",
            "solver",
            "iterations",
            "residual",
            "ended",
            "forward, ms",
            "forward + backward, ms",
            "error of gradients",
        ),
        family(),
        f"{LENGTH} blocks, d = {WIDTH}, {BATCH} samples; in PyTorch's ops, but for `auto`. Errors are the largest, relative to "
        "the largest number, against the plain loop in float64. A solver that failed went block by block afterwards, and "
        "its iterations are those until it was given up; the times of its later calls, which do not try again at once, are "
        "those of block by block. The chaotic chain's gradient grows by orders of magnitude, and so does what rounding does "
        "to it, whoever computes it.",
    )
    record(
        "starts",
        "Where Newton's iteration starts, in training",
        ("blocks", "start", "iterations, mean of 30 steps", "forward, ms", "iterations, same batch again"),
        starts(),
        "The network of `examples/train_resnet.py` on scikit-learn's digits, 32 a batch, w = 8, Adam, in PyTorch's ops. "
        "Iterations of `picard` count its two sweeps.",
    )
    record(
        "hopeless",
        "What a hopeless solver costs",
        (
            "solver",
            "given up since",
            "attempts in 200",
            "with an attempt, ms",
            "block by block, ms",
            "mean of 199 calls",
        ),
        hopeless(),
        f"The chaotic chain of {LENGTH} blocks, forward, in PyTorch's ops; the mean is that of all calls but the first.",
    )


if __name__ == "__main__":
    main()
