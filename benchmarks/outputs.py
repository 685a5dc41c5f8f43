"""`python -m benchmarks.outputs`: what it costs that everything leaves a time loop, beside the last state alone.

1,024 steps, 16 numbers a sample, one thread: cells of which all states are stacked, and loops that give away what is no state.
The two take turns, and each time is the least of its turns. The record is `results/outputs.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pcr_fx
from benchmarks.measure import Call, least_ms, record

STEPS, WIDTH = 1024, 16
ROUNDS = 60


class Loop(nn.Module):
    """Calls `step` for each input, and returns all that it gives away, stacked, or the last state alone.

    Args:
        everything: which of the two.
        count: how many states there are.
    """

    def __init__(self, everything: bool, count: int = 1) -> None:
        super().__init__()
        self.everything, self.count = everything, count

    def step(self, x: Tensor, *states: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The new states, and what the step gives away."""
        raise NotImplementedError

    def forward(self, xs: Tensor) -> list[Tensor]:
        states = tuple(torch.zeros_like(xs[0]) for _ in range(self.count))
        given = []
        for t in range(STEPS):
            states, outputs = self.step(xs[t], *states)
            given.append(outputs)
        if not self.everything:
            return [states[0]]
        return [torch.stack(one, 1) for one in zip(*given, strict=True)]


class Gru(Loop):
    def __init__(self, everything: bool) -> None:
        super().__init__(everything)
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def step(self, x: Tensor, *states: Tensor) -> Any:
        h = self.cell(x, *states)
        return (h,), (h,)


class Lstm(Loop):
    def __init__(self, everything: bool) -> None:
        super().__init__(everything, 2)
        self.cell = nn.LSTMCell(WIDTH, WIDTH)

    def step(self, x: Tensor, *states: Tensor) -> Any:
        new = self.cell(x, states)
        return new, (new[0],)


class Biquad(Loop):
    def __init__(self, everything: bool) -> None:
        super().__init__(everything, 2)
        self.b, self.a = nn.Parameter(torch.tensor([0.2, 0.3, 0.2])), nn.Parameter(torch.tensor([0.5, -0.3]))

    def step(self, x: Tensor, *states: Tensor) -> Any:
        y = self.b[0] * x + states[0]
        return (self.b[1] * x + self.a[0] * y + states[1], self.b[2] * x + self.a[1] * y), (y,)


class Spiking(Loop):
    """Leaky neurons that fire, with a surrogate gradient."""

    def __init__(self, everything: bool) -> None:
        super().__init__(everything)
        self.taken = nn.Linear(WIDTH, WIDTH)

    def step(self, x: Tensor, *states: Tensor) -> Any:
        v = 0.9 * states[0] + self.taken(x)
        soft = torch.sigmoid(4 * (v - 1))
        fired = (v > 1).to(v.dtype) - soft.detach() + soft
        return (v - fired,), (fired,)


class Bucket(Loop):
    """A store with three fluxes out of it."""

    def __init__(self, everything: bool) -> None:
        super().__init__(everything)
        self.rates = nn.Parameter(torch.tensor([0.1, 0.3, 0.2]))

    def step(self, x: Tensor, *states: Tensor) -> Any:
        (store,) = states
        evaporated = self.rates[0] * torch.sigmoid(store)
        flow, leak = self.rates[1] * torch.relu(store - 0.5), self.rates[2] * store.abs()
        return (store + 0.1 * x - evaporated - flow - leak,), (evaporated, flow, leak)


def calls(run: Callable[..., Any], model: nn.Module, xs: Tensor) -> tuple[Call, Call]:
    """A forward, and a training step."""

    def forward() -> None:
        with torch.no_grad():
            run(xs)

    def train() -> None:
        model.zero_grad()
        sum(one.sum() for one in run(xs)).backward()

    return forward, train


def row(made: type[Loop], samples: int, eager: bool) -> list[str]:
    """That of one loop in the table."""
    torch.manual_seed(0)
    xs = torch.randn(STEPS, samples, WIDTH)
    models = [made(everything) for everything in (False, True)]
    pairs = [calls(pcr_fx.transform(model, xs), model, xs) for model in models]
    columns = [least_ms(turns, ROUNDS) for turns in zip(*pairs, strict=True)]
    cells = [", ".join(f"{times[index]:.3g}" for times in columns) for index in range(2)]
    ratios = ", ".join(f"{everything / last:.2f}" for last, everything in columns)
    itself = least_ms(calls(models[1], models[1], xs), 3) if eager else []
    return [made.__name__, str(samples), *cells, ratios, ", ".join(f"{time:.3g}" for time in itself)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--eager", action="store_true", help="time the models themselves too, which takes minutes")
    parser.add_argument("--machine", default="", help="what else is to be said of the machine, for the record")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    loops = (Gru, Lstm, Biquad, Spiking, Bucket)
    rows = [row(made, samples, chosen.eager) for samples in (1, 32) for made in loops]
    headers = ["loop", "samples", "last state (ms)", "everything (ms)", "ratio", "eager (ms)"]
    notes = f"{STEPS} steps, {WIDTH} numbers a sample; forward, then a training step. {chosen.machine}"
    record("outputs", "What it costs that everything leaves a time loop", headers, rows, notes)


if __name__ == "__main__":
    main()
