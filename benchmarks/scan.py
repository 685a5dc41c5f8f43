"""`python -m benchmarks.scan`: loops by `pcr_fx.scan` beside a plain loop, PyTorch's own `scan`, `nn.GRU` and `jax.lax.scan`.

One thread, float32; the contestants take turns, and each time is the least of its turns. JAX, where it is installed, is jitted.
What takes longer than a second a call is called twice. The record is `results/scan.md`; `--quick` prints a few rows.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import pcr_fx
from benchmarks.measure import record

ROUNDS, SHORT_SECONDS, LONG_SECONDS = 20, 0.02, 1.0
# Steps from which on a plain loop, and PyTorch's own scan, take too long to be called.
MOST_PLAIN, MOST_PYTORCH = 2048, 2048


@dataclass
class Problem:
    """A loop.

    Attributes:
        whole: the same by one of PyTorch's layers, where there is one.
        jax: the step and its arguments for `jax.lax.scan`, of the weights in `weights`.
    """

    name: str
    step: Callable[[Any, Any], tuple[Any, Any]]
    init: Any
    xs: Tensor
    weights: list[Tensor]
    whole: Callable[[], Any] | None = None
    jax: Callable[[Any, Any, Any], Any] | None = None

    @property
    def leaves(self) -> list[Tensor]:
        return [self.xs, *self.weights]


def plain_loop(step: Any, init: Any, xs: Tensor) -> tuple[Any, Any]:
    carry, outputs = init, []
    for x in xs.unbind(0):
        carry, y = step(carry, x)
        outputs.append(pytree.tree_leaves(y))
    return carry, [torch.stack(parts) for parts in zip(*outputs, strict=True)]


def tanh_rnn(length: int, batch: int, size: int) -> Problem:
    w, u = (nn.Parameter(torch.randn(size, size) / size**0.5 / 2) for _ in range(2))

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h @ w + x @ u)
        return h, h

    def in_jax(weights: Any, h: Any, x: Any) -> Any:
        import jax.numpy as jnp

        h = jnp.tanh(h @ weights[0] + x @ weights[1])
        return h, h

    return Problem("tanh RNN", step, torch.zeros(batch, size), torch.randn(length, batch, size), [w, u], jax=in_jax)


def gru(length: int, batch: int, size: int) -> Problem:
    cell, layer = nn.GRUCell(size, size), nn.GRU(size, size)
    xs = torch.randn(length, batch, size)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = cell(x, h)
        return h, h

    return Problem("GRU", step, torch.zeros(batch, size), xs, list(cell.parameters()), lambda: layer(xs)[0])


def lstm(length: int, batch: int, size: int) -> Problem:
    cell, layer = nn.LSTMCell(size, size), nn.LSTM(size, size)
    xs = torch.randn(length, batch, size)

    def step(carry: Any, x: Tensor) -> tuple[Any, Tensor]:
        h, c = cell(x, carry)
        return (h, c), h

    init = torch.zeros(batch, size), torch.zeros(batch, size)
    return Problem("LSTM", step, init, xs, list(cell.parameters()), lambda: layer(xs)[0])


def leaky(length: int, batch: int, size: int) -> Problem:
    decay = nn.Parameter(torch.full((size,), 0.9))

    def step(v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        v = decay * v + x
        spike = (v > 1).to(v.dtype)
        return v - spike, spike * v

    return Problem("LIF", step, torch.zeros(batch, size), torch.randn(length, batch, size), [decay])


def runge_kutta(length: int, batch: int, size: int) -> Problem:
    a, b = (nn.Parameter(torch.randn(size, size) / size**0.5) for _ in range(2))

    def field(y: Tensor) -> Tensor:
        return torch.tanh(y @ a) @ b - y

    def step(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = 0.05
        k1 = field(y)
        k2 = field(y + h / 2 * k1)
        k3 = field(y + h / 2 * k2)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + field(y + h * k3)) + h * x
        return y, y

    return Problem("RK4", step, torch.zeros(batch, size), torch.randn(length, batch, size), [a, b])


def kalman(length: int, batch: int, size: int) -> Problem:
    transition = nn.Parameter(0.9 * torch.eye(4) + 0.05 * torch.randn(4, 4))
    seen = nn.Parameter(torch.randn(1, 4))

    def step(carry: Any, x: Tensor) -> tuple[Any, Tensor]:
        mean, covariance = carry
        mean = mean @ transition.T
        covariance = transition @ covariance @ transition.T + 0.1 * torch.eye(4)
        gain = covariance @ seen.T / (seen @ covariance @ seen.T + 0.5)
        mean = mean + (x[..., :1] - mean @ seen.T) @ gain.T
        covariance = covariance - gain @ seen @ covariance
        return (mean, covariance), mean

    init = torch.zeros(batch, 4), torch.eye(4)
    return Problem("Kalman filter", step, init, torch.randn(length, batch, size), [transition, seen])


def affine(length: int, batch: int, size: int) -> Problem:
    a = nn.Parameter(torch.rand(size))

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = a * h + x
        return h, h

    return Problem("a x + b", step, torch.zeros(batch, size), torch.randn(length, batch, size), [a])


KINDS = (gru, lstm, tanh_rnn, leaky, runge_kutta, kalman, affine)


def contestants(problem: Problem, trains: bool) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    length = len(problem.xs)

    def called(run: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> None:
            with contextlib.nullcontext() if trains else torch.no_grad():
                outputs = [one for one in pytree.tree_leaves(run()) if one.requires_grad]
            if trains:
                torch.autograd.backward(outputs, [torch.ones_like(one) for one in outputs])

        return call

    found = {"pcr_fx.scan": called(lambda: pcr_fx.scan(problem.step, problem.init, problem.xs))}
    if length <= MOST_PLAIN:
        found["eager"] = called(lambda: plain_loop(problem.step, problem.init, problem.xs))
    if length <= MOST_PYTORCH:
        theirs = torch._higher_order_ops.scan

        def separate(carry: Any, x: Tensor) -> tuple[Any, Any]:  # it may not return one tensor twice
            carry, y = problem.step(carry, x)
            return carry, pytree.tree_map(torch.clone, y)

        found["PyTorch's scan"] = called(lambda: theirs(separate, problem.init, problem.xs))
    if problem.whole is not None:
        found["layer"] = called(problem.whole)
    if problem.jax is not None:
        with contextlib.suppress(ImportError):
            found["JAX"] = _jitted(problem, trains)
    return found


def _jitted(problem: Problem, trains: bool) -> Callable[[], Any]:
    import jax

    assert problem.jax is not None
    step = problem.jax
    weights = [jax.numpy.asarray(one.detach().numpy()) for one in problem.weights]
    init, xs = (jax.numpy.asarray(one.numpy()) for one in (problem.init, problem.xs))

    def forward(weights: Any, init: Any, xs: Any) -> Any:
        return jax.lax.scan(lambda h, x: step(weights, h, x), init, xs)

    def total(weights: Any, init: Any, xs: Any) -> Any:
        return sum(one.sum() for one in jax.tree_util.tree_leaves(forward(weights, init, xs)))

    run = jax.jit(jax.grad(total) if trains else forward)
    return lambda: jax.block_until_ready(run(weights, init, xs))


def least_ms(contestants: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The least time of each, all taking turns; NaN for what raised."""
    best = dict.fromkeys(contestants, math.inf)
    for round_ in range(ROUNDS):
        for name, call in contestants.items():
            if math.isnan(best[name]) or (round_ > 1 and best[name] > LONG_SECONDS):
                continue
            try:
                # Short calls are made three times in a row: the first finds the caches full of others'.
                for _ in range(3 if best[name] < SHORT_SECONDS else 1):
                    began = time.perf_counter()
                    call()
                    best[name] = min(best[name], time.perf_counter() - began)
            except Exception as error:
                print(f"{name}: {type(error).__name__} {str(error).splitlines()[0] if str(error) else ''}")
                best[name] = math.nan
    return {name: 1e3 * seconds for name, seconds in best.items()}


def first_call_seconds(kind: Callable[..., Problem], length: int) -> tuple[float, float]:
    """Those of the first call, and of ten other lengths together."""
    problem = kind(length, 1, 16)
    began = time.perf_counter()
    pcr_fx.scan(problem.step, problem.init, problem.xs)
    first, began = time.perf_counter() - began, time.perf_counter()
    for fewer in range(1, 11):
        pcr_fx.scan(problem.step, problem.init, problem.xs[fewer:])
    return first, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    names = ["pcr_fx.scan", "eager", "PyTorch's scan", "layer", "JAX"]
    rows: list[Sequence[Any]] = []
    sizes = [(16, 1, 128)] if quick else [(h, b, t) for h in (16, 64) for b in (1, 32) for t in (128, 1024, 16384)]
    for kind in KINDS:
        for size, batch, length in [(256, 1, sizes[0][2])] if kind is affine else sizes:
            torch.manual_seed(0)
            problem = kind(length, batch, size)
            for trains in (False, True):
                taken = least_ms(contestants(problem, trains))
                way = "with backward" if trains else "forward"
                rows.append([problem.name, size, batch, length, way, *(taken.get(name, math.nan) for name in names)])
                print(*rows[-1], flush=True)
    starts = [(kind.__name__, *first_call_seconds(kind, 64 if quick else 1024)) for kind in (tanh_rnn, gru)]
    words = "; ".join(f"{name}: {first:.2f} s, {1e3 * more:.1f} ms" for name, first, more in starts)
    notes = f"Milliseconds a call. The first call, and ten other lengths together: {words}."
    print(notes)
    if not quick:
        record("scan", "Loops of any length", ["loop", "width", "samples", "steps", "", *names], rows, notes)


if __name__ == "__main__":
    main()
