"""`python -m benchmarks.recurrences`: training of recurrences, beside eager, PyTorch's modules and a jitted `jax.lax.scan`.

A Python loop over a cell, whose last state is wanted, and gradients of its weights; float32. The contestants take turns, and
each time is the least of its turns; what takes longer than a second a call is called twice. JAX is only timed where it can be
imported. One thread, or `--threads`; `--quick` prints a few rows, `--write` keeps the record as `results/recurrences.md`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pcr_fx
from benchmarks.measure import record
from benchmarks.scan import least_ms

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    jax = None

STEPS, STEPS_WIDE = 1024, 256
SIZES = [(h, b, STEPS) for h in (16, 64) for b in (1, 32)] + [(h, b, STEPS_WIDE) for h in (128, 256) for b in (1, 32)]
CELLS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "GRU": (nn.GRUCell, nn.GRU),
    "LSTM": (nn.LSTMCell, nn.LSTM),
    "tanh RNN": (nn.RNNCell, nn.RNN),
}
NAMES = ("ours", "eager", "PyTorch's module", "JAX")


class Recurrence(nn.Module):
    """The last state of a cell over `xs`, `[T, B, h]`."""

    def __init__(self, cell: nn.Module, has_two: bool) -> None:
        super().__init__()
        self.cell, self.has_two = cell, has_two

    def forward(self, xs: Tensor, h: Tensor) -> Tensor:
        state: Any = (h, h) if self.has_two else h
        for x in xs.unbind(0):
            state = self.cell(x, state)
        return state[0] if self.has_two else state


def gru(w: Any, h: Any, x: Any) -> Any:
    (r, z, n), (hr, hz, hn) = (jnp.split(part, 3, -1) for part in (_into(w, x, "ih"), _into(w, h, "hh")))
    z = jax.nn.sigmoid(z + hz)
    return (1 - z) * jnp.tanh(n + jax.nn.sigmoid(r + hr) * hn) + z * h


def lstm(w: Any, state: Any, x: Any) -> Any:
    h, c = state
    i, f, g, o = jnp.split(_into(w, x, "ih") + _into(w, h, "hh"), 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _rnn(w: Any, h: Any, x: Any) -> Any:
    return jnp.tanh(_into(w, x, "ih") + _into(w, h, "hh"))


def _into(w: Any, x: Any, name: str) -> Any:
    return x @ w[f"weight_{name}"].T + w[f"bias_{name}"]


def in_jax(kind: str, cell: nn.Module, xs: Tensor, h: Tensor, trains: bool) -> Callable[[], Any]:
    """The same jitted, or its gradients with respect to the weights."""
    step = {"GRU": gru, "LSTM": lstm, "tanh RNN": _rnn}[kind]
    weights = {name: jnp.asarray(one.detach().numpy()) for name, one in cell.named_parameters()}
    given, first = jnp.asarray(xs.numpy()), jnp.asarray(h.numpy())

    def last(weights: Any, given: Any, first: Any) -> Any:
        state = (first, first) if kind == "LSTM" else first
        state, _ = jax.lax.scan(lambda state, x: (step(weights, state, x), None), state, given)
        return state[0] if kind == "LSTM" else state

    run = jax.jit(jax.grad(lambda *given: last(*given).sum()) if trains else last)
    return lambda: jax.block_until_ready(run(weights, given, first))


def contestants(kind: str, size: int, batch: int, steps: int, trains: bool) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    torch.manual_seed(0)
    of_cell, of_module = CELLS[kind]
    cell, module = of_cell(size, size), of_module(size, size)
    xs, h = torch.randn(steps, batch, size), torch.zeros(batch, size)
    eager = Recurrence(cell, kind == "LSTM")
    ours = pcr_fx.transform(eager, (xs, h))

    def called(run: Callable[[], Tensor]) -> Callable[[], None]:
        def call() -> None:
            with torch.set_grad_enabled(trains):
                last = run()
            if trains:
                last.sum().backward()

        return call

    found: dict[str, Callable[[], Any]] = {
        "ours": called(lambda: ours(xs, h)),
        "eager": called(lambda: eager(xs, h)),
        "PyTorch's module": called(lambda: module(xs)[0][-1]),
    }
    if jax is not None:
        found["JAX"] = in_jax(kind, cell, xs, h, trains)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if jax is None:
        print("JAX cannot be imported, and is left out.")
    rows = []
    for kind in CELLS:
        for size, batch, steps in [(16, 1, 128), (16, 32, 128)] if options.quick else SIZES:
            forward = least_ms(contestants(kind, size, batch, steps, False))
            both = least_ms(contestants(kind, size, batch, steps, True))
            cells = [f"{forward.get(name, math.nan):.2f} / {both.get(name, math.nan):.2f}" for name in NAMES]
            adjoint = f"{(both['ours'] - forward['ours']) / forward['ours']:.1f}"
            rows.append([kind, size, batch, steps, *cells, adjoint])
            print(*rows[-1], sep=" | ", flush=True)
    notes = "Milliseconds, forward / forward + backward; what the backward takes of ours over its forward."
    headers = ["cell", "h", "samples", "steps", *NAMES, "backward / forward"]
    if options.write:
        record("recurrences", "Training of recurrences", headers, rows, notes)
    else:
        print(notes)


if __name__ == "__main__":
    main()
