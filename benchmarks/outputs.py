"""`python -m benchmarks.outputs`: what it costs that everything leaves a time loop, beside the last state alone.

1,024 steps, 16 numbers a sample, float32, one thread: cells of which all states are stacked, and loops that give away what is no
state; forward, and a training step. Everything is compared with the last state alone, with the loop in eager, with the same as
one of PyTorch's modules, and with a jitted `jax.lax.scan` that stacks the same, where JAX can be imported. The contestants take
turns, and each time is the least of its turns. `--only NAME` runs one loop, `--quick` few turns, `--write` keeps the record as
`results/outputs.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pcr_fx
from benchmarks.measure import Call, least_ms, record
from benchmarks.outputs_jax import in_jax, jax

STEPS, WIDTH = 1024, 16
ROUNDS, QUICK = 60, 5
NAMES = ("last state", "everything", "eager", "module", "JAX")


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


LOOPS: tuple[type[Loop], ...] = (Gru, Lstm, Biquad, Spiking, Bucket)
# Those that are a module of PyTorch's as a whole.
MODULES: dict[type[Loop], type[nn.Module]] = {Gru: nn.GRU, Lstm: nn.LSTM}


def calls(run: Callable[..., Any], model: nn.Module, xs: Tensor) -> tuple[Call, Call]:
    """A forward, and a training step."""

    def forward() -> None:
        with torch.no_grad():
            run(xs)

    def train() -> None:
        model.zero_grad()
        sum(one.sum() for one in run(xs)).backward()

    return forward, train


def contestants(made: type[Loop], xs: Tensor) -> dict[str, tuple[Call, Call]]:
    """A forward and a training step of each, by name."""
    models = [made(everything) for everything in (False, True)]
    last, everything = (calls(pcr_fx.transform(model, xs), model, xs) for model in models)
    found = {"last state": last, "everything": everything, "eager": calls(models[1], models[1], xs)}
    if made in MODULES:
        module = MODULES[made](WIDTH, WIDTH)
        found["module"] = calls(lambda xs: [module(xs)[0].transpose(0, 1)], module, xs)
    if jax is not None:
        found["JAX"] = in_jax(made.__name__, models[1], models[1].count, xs)
    return found


def row(made: type[Loop], samples: int, rounds: int) -> list[str]:
    """That of one loop in the table."""
    torch.manual_seed(0)
    found = contestants(made, torch.randn(STEPS, samples, WIDTH))
    times: dict[str, tuple[float, ...]] = {}
    # Eager takes a hundred times as long: few turns of its own.
    for names, turns in ((found.keys() - {"eager"}, rounds), ({"eager"}, 3)):
        columns = [least_ms([found[name][direction] for name in names], turns) for direction in range(2)]
        times |= dict(zip(names, zip(*columns, strict=True), strict=True))
    last, (forward, both) = times["last state"], times["everything"]
    cells = [", ".join(f"{time:.3g}" for time in times[name]) if name in times else "" for name in NAMES]
    ratios = f"{forward / last[0]:.2f}, {both / last[1]:.2f}"
    gains = [
        ", ".join(f"{other / ours:.2g}" for other, ours in zip(times[name], (forward, both), strict=True))
        if name in times
        else ""
        for name in NAMES[2:]
    ]
    return [made.__name__, str(samples), *cells, ratios, *gains, f"{(last[1] - last[0]) / last[0]:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[made.__name__ for made in LOOPS], help="one loop alone")
    parser.add_argument("--quick", action="store_true", help="take few turns")
    parser.add_argument("--write", action="store_true", help="keep the record")
    parser.add_argument("--machine", default="", help="what else is to be said of the machine, for the record")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if jax is None:
        print("JAX cannot be imported, and is left out.")
    rows = []
    for samples in (1, 32):
        for made in LOOPS:
            if chosen.only in (None, made.__name__):
                rows.append(row(made, samples, QUICK if chosen.quick else ROUNDS))
                print(*rows[-1], sep=" | ", flush=True)
    notes = (
        f"{STEPS} steps, {WIDTH} numbers a sample; milliseconds of a forward, then of a training step. Everything over the "
        "last state; then how many times as long as everything eager, PyTorch's module and JAX take; then what the "
        f"backward takes over its forward where the last state is wanted. {chosen.machine}"
    ).rstrip()
    gains = [f"{name} / everything" for name in NAMES[2:]]
    headers = ["loop", "samples", *NAMES, "everything / last", *gains, "backward / forward"]
    if chosen.write:
        record("outputs", "What it costs that everything leaves a time loop", headers, rows, notes)
    else:
        print(notes)


if __name__ == "__main__":
    main()
