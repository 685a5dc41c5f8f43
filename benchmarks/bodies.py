"""`python -m benchmarks.bodies`: ten models with what people write inside a block, beside eager and a jitted `jax.lax.scan`.

One thread, float32; the contestants take turns, and each time is the least of its turns. The first call is through `transform`,
with no kernel kept from before. JAX is only timed where it can be imported. `--write` keeps the record as `results/bodies.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import pcr_fx
from benchmarks.bodies_jax import IN_JAX
from benchmarks.measure import record

STEPS, BATCH, WIDTH = 256, 4, 16
ROUNDS, LONG_SECONDS = 30, 0.5


class Body(nn.Module):
    """A model of the benchmark: `xs` are its inputs, and its forward the loop.

    Attributes:
        xs: what it is called with.
    """

    xs: tuple[Tensor, ...]


class Pendulum(Body):
    """A rollout by Runge and Kutta, with the components of the state by their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([1.0, 0.1]))
        self.xs = (torch.randn(BATCH, 2),)

    def slope(self, y: Tensor) -> Tensor:
        return torch.stack([y[..., 1], -self.p[0] * torch.sin(y[..., 0]) - self.p[1] * y[..., 1]], -1)

    def forward(self, y: Tensor) -> Tensor:
        h = 0.01
        for _ in range(STEPS):
            a = self.slope(y)
            b = self.slope(y + h / 2 * a)
            c = self.slope(y + h / 2 * b)
            y = y + h / 6 * (a + 2 * b + 2 * c + self.slope(y + h * c))
        return y


class LotkaVolterra(Body):
    """Two populations in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([1.1, 0.4, 0.1, 0.4]))
        self.xs = (torch.rand(BATCH) + 1, torch.rand(BATCH) + 1)

    def forward(self, prey: Tensor, hunters: Tensor) -> Tensor:
        state = {"prey": prey, "hunters": hunters}
        for _ in range(STEPS):
            x, y = state["prey"], state["hunters"]
            state = {
                "prey": x + 0.01 * (self.p[0] * x - self.p[1] * x * y),
                "hunters": y + 0.01 * (self.p[2] * x * y - self.p[3] * y),
            }
        return state["prey"] + state["hunters"]


class Kalman(Body):
    """An extended filter of 4 states and 2 measurements, with the likelihood."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Parameter(torch.eye(4) + 0.02 * torch.randn(4, 4))
        self.h = nn.Parameter(torch.randn(2, 4) / 2)
        self.register_buffer("q", 0.01 * torch.eye(4))
        self.register_buffer("r", 0.1 * torch.eye(2))
        self.xs = (torch.randn(STEPS, 2),)

    def forward(self, ys: Tensor) -> Tensor:
        mean, covariance, likelihood = torch.zeros(4), torch.eye(4), torch.zeros(())
        for t in range(STEPS):
            mean = self.f @ torch.tanh(mean)
            slope = self.f * (1 - torch.tanh(mean) ** 2)
            covariance = slope @ covariance @ slope.T + self.q
            spread = self.h @ covariance @ self.h.T + self.r
            gain = torch.linalg.solve(spread, self.h @ covariance).T
            missed = ys[t] - self.h @ mean
            likelihood = likelihood - 0.5 * (torch.logdet(spread) + missed @ torch.linalg.solve(spread, missed))
            mean = mean + gain @ missed
            covariance = (torch.eye(4) - gain @ self.h) @ covariance
        return likelihood + mean.sum()


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:  # type: ignore[override]
        (v,) = ctx.saved_tensors
        return cotangent / (1 + 10 * v.abs()) ** 2


class Spiking(Body):
    """Leaky neurons that fire, with a surrogate gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.xs = (torch.randn(STEPS, BATCH, WIDTH),)

    def forward(self, xs: Tensor) -> Tensor:
        v = s = torch.zeros(BATCH, WIDTH)
        spikes = []
        for t in range(STEPS):
            v = 0.9 * v + xs[t] + s @ self.w - s
            s = _Spike.apply(v - 1)
            spikes.append(s)
        return torch.stack(spikes)


class Masked(Body):
    """A GRU that starts anew where an episode is done."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)
        self.xs = (torch.randn(STEPS, BATCH, WIDTH), torch.rand(STEPS, BATCH, 1) < 0.1)

    def forward(self, xs: Tensor, done: Tensor) -> Tensor:
        h = torch.zeros(BATCH, WIDTH)
        for t in range(STEPS):
            h = self.cell(xs[t], torch.where(done[t], 0.0, h))
        return h


class Dropped(Body):
    """A GRU with dropout of its state, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.dropout = nn.GRUCell(WIDTH, WIDTH), nn.Dropout(0.1)
        self.xs = (torch.randn(STEPS, BATCH, WIDTH),)

    def forward(self, xs: Tensor) -> Tensor:
        h = torch.zeros(BATCH, WIDTH)
        for t in range(STEPS):
            h = self.dropout(self.cell(xs[t], h))
        return h


class Denoiser(Body):
    """Steps of a diffusion backwards, each with an embedding of its number."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Embedding(STEPS, WIDTH)
        self.into, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.xs = (torch.randn(BATCH, WIDTH),)

    def forward(self, x: Tensor) -> Tensor:
        for t in reversed(range(STEPS)):
            number = torch.full((BATCH,), t, dtype=torch.long)
            x = x - 0.05 * self.out(torch.nn.functional.silu(self.into(x) + self.time(number)))
        return x


class Sinkhorn(Body):
    """A plan of transport of 8 masses to 8 places."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = nn.Parameter(torch.rand(8, 8))
        self.xs = (torch.zeros(BATCH, 8),)

    def forward(self, f: Tensor) -> Tensor:
        for _ in range(STEPS):
            g = -torch.logsumexp((f[:, :, None] - self.cost) / 0.1, 1) * 0.1
            f = -torch.logsumexp((g[:, None, :] - self.cost) / 0.1, 2) * 0.1
        return f


class Stencil(Body):
    """Heat on a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.rand(32))
        self.xs = (torch.randn(BATCH, 32),)

    def forward(self, u: Tensor) -> Tensor:
        for _ in range(STEPS):
            u = u + 0.1 * self.k * (torch.roll(u, 1, -1) - 2 * u + torch.roll(u, -1, -1))
        return u


class Circuit(Body):
    """20 layers of rotations of three qubits, each followed by signs that entangle them."""

    def __init__(self) -> None:
        super().__init__()
        self.angles = nn.Parameter(torch.randn(20, 3))
        self.register_buffer("signs", torch.tensor([1.0, 1, 1, -1, 1, -1, -1, -1]))
        state = torch.zeros(BATCH, 8, dtype=torch.complex64)
        state[:, 0] = 1
        self.xs = (state,)

    def forward(self, state: Tensor) -> Tensor:
        for layer in range(20):
            for qubit in range(3):
                half = self.angles[layer, qubit] / 2
                c, s = torch.cos(half), torch.sin(half)
                parts = state.reshape(BATCH, 2**qubit, 2, 4 // 2**qubit)
                zero, one = parts[:, :, 0], parts[:, :, 1]
                state = torch.stack([c * zero - 1j * s * one, c * one - 1j * s * zero], 2).reshape(BATCH, 8)
            state = state * self.signs
        return state.abs().square()


BODIES: dict[str, type[Body]] = {
    "a pendulum, RK4": Pendulum,
    "Lotka-Volterra in a dict": LotkaVolterra,
    "an extended Kalman filter": Kalman,
    "spiking neurons": Spiking,
    "a GRU with done masks": Masked,
    "a GRU with dropout": Dropped,
    "a denoiser": Denoiser,
    "Sinkhorn": Sinkhorn,
    "a stencil by roll": Stencil,
    "a circuit of 3 qubits": Circuit,
}

Call = Callable[[], Any]


def calls(run: Callable[..., Any], model: Body) -> tuple[Call, Call]:
    """A forward, and one with its backward."""

    def forward() -> None:
        with torch.no_grad():
            run(*model.xs)

    def train() -> None:
        model.zero_grad()
        run(*model.xs).sum().backward()

    return forward, train


def least_ms(turns: list[Call]) -> list[float]:
    """The least time of each of these calls, which take turns, in milliseconds."""
    times = [math.inf for _ in turns]
    for call in turns:
        call()
    for turn in range(ROUNDS):
        for index, call in enumerate(turns):
            if turn > 2 and times[index] > 1e3 * LONG_SECONDS / ROUNDS:
                continue
            began = time.perf_counter()
            call()
            times[index] = min(times[index], 1e3 * (time.perf_counter() - began))
    return times


@contextlib.contextmanager
def no_kernels_kept() -> Any:
    """A folder of its own for what is compiled."""
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            yield
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before


def row(name: str) -> list[str]:
    """The times of one model: its first call, then forward, and with backward."""
    torch.manual_seed(0)
    model = BODIES[name]()
    with no_kernels_kept():
        began = time.perf_counter()
        fast = pcr_fx.transform(model, example_inputs=model.xs)
        fast(*model.xs)
        first = time.perf_counter() - began
        both = [calls(run, model) for run in (fast, model)]
        in_jax = IN_JAX(name, model) if IN_JAX is not None else None
        cells = [name, f"{first:.2f}"]
        for index in range(2):
            turns = [pair[index] for pair in both] + ([] if in_jax is None else [in_jax[index]])
            ours, *others = least_ms(turns)
            cells += [f"{ours:.3g}", *(f"{other:.3g} ({other / ours:.1f}x)" for other in others)]
            cells += ["-"] * (2 - len(others))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the names of the models to time; all by default")
    parser.add_argument("--write", action="store_true", help="keep the record")
    parser.add_argument("--machine", default="", help="what else is to be said of the machine, for the record")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name in BODIES if not chosen.names or any(part in name for part in chosen.names)]
    headers = ["model", "first call (s)", "forward (ms)", "eager", "lax.scan", "and backward (ms)", "eager", "lax.scan"]
    rows = []
    for name in names:
        rows.append(row(name))
        print(*rows[-1], sep="  ", flush=True)
    if not chosen.write:
        print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
        return
    notes = f"{STEPS} steps of {BATCH} samples (the filter of one, the circuit 20), float32. {chosen.machine}"
    record("bodies", "What people write inside a block", headers, rows, notes)


if __name__ == "__main__":
    main()
