"""Train a spiking network on sequences of different lengths: scikit-learn's digits, pixel by pixel, each until its ink ends.

A layer of leaky neurons sees a digit as a train of brightness, one of 64 pixels at a time, and fires; its spikes drive ten
leaky outputs, and the one that stands highest at the end is the answer. Spikes have no derivative, so they lend one
(a surrogate). Digits whose ink ends at the same pixel make up a batch, so that batches have some 25 different lengths.
The loop over pixels is `pcr_fx.scan`: traced once, one kernel for all lengths. The same training in a plain Python loop
starts from the same weights, for the first epochs.

    python examples/spiking_digits.py            # some two minutes on two cores
    python examples/spiking_digits.py --quick    # less than 30 s
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pcr_fx

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TESTED = 360
BATCH = 32
# How far the losses of two right runs may be from each other, in their first epoch.
MOST_DRIFT = 0.02


class Spike(torch.autograd.Function):
    """1 above the threshold, with the derivative of a soft step."""

    @staticmethod
    def forward(ctx: Any, over: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(over)
        return (over > 0).to(over.dtype)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:  # type: ignore[override]
        (over,) = ctx.saved_tensors
        return cotangent / (1 + 5 * over.abs()) ** 2


class Spiking(nn.Module):
    """Leaky neurons that fire, and outputs that add up what they are told: `[T, B, 1]` to scores `[B, 10]`, and spikes."""

    def __init__(self, width: int, run: Callable[..., Any]) -> None:
        super().__init__()
        self.seen, self.back, self.out = nn.Linear(1 + 64, width), nn.Linear(width, width), nn.Linear(width, 10)
        self.decay = nn.Parameter(torch.full((width,), 2.0))
        self.run = run
        nn.init.normal_(self.back.weight, std=0.3 / width**0.5)

    def step(self, carry: tuple[Tensor, ...], pixel: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """One pixel, at its place."""
        voltage, fired, scores = carry
        voltage = torch.sigmoid(self.decay) * voltage * (1 - fired) + self.seen(pixel) + self.back(fired)
        fired = Spike.apply(voltage - 1)
        scores = scores + 0.1 * self.out(fired)
        return (voltage, fired, scores), fired

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        length, batch, _ = pixels.shape
        places = torch.eye(64)[:length, None] * pixels
        rest = pixels.new_zeros(batch, self.decay.shape[0])
        init = rest, rest, pixels.new_zeros(batch, 10)
        (_, _, scores), spikes = self.run(self.step, init, torch.cat([pixels, 4 * places], -1))
        return scores, spikes


def plain_loop(step: Any, init: Any, xs: Tensor) -> Any:
    carry, outputs = init, []
    for x in xs.unbind(0):
        carry, y = step(carry, x)
        outputs.append(y)
    return carry, torch.stack(outputs)


def batches(pixels: Tensor, labels: Tensor, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Digits of one length each, `[T, B, 1]`, with the labels of the first ones: others only fill up a batch."""
    lengths = 64 - (pixels.flip(1) > 0).int().argmax(1)
    found = []
    for length in lengths.unique():
        those = (lengths == length).nonzero()[:, 0]
        those = those[torch.randperm(len(those), generator=generator)]
        for part in those.split(BATCH):
            filled = part[torch.arange(BATCH) % len(part)]
            found.append((pixels[filled, : int(length)].T.unsqueeze(-1), labels[part]))
    return [found[index] for index in torch.randperm(len(found), generator=generator)]


def train(model: Spiking, data: tuple[Tensor, Tensor], epochs: int) -> tuple[list[float], list[float]]:
    """The mean loss and the seconds of each epoch."""
    optimiser, generator = torch.optim.Adam(model.parameters(), 1e-2), torch.Generator().manual_seed(0)
    losses, seconds = [], []
    for epoch in range(epochs):
        began, total, count = time.perf_counter(), 0.0, 0
        for pixels, labels in batches(*data, generator):
            optimiser.zero_grad()
            loss = F.cross_entropy(model(pixels)[0][: len(labels)], labels)
            loss.backward()
            optimiser.step()
            total, count = total + loss.item() * len(labels), count + len(labels)
        losses.append(total / count)
        seconds.append(time.perf_counter() - began)
        print(f"  epoch {epoch + 1}: loss {losses[-1]:.4f}, {seconds[-1]:.2f} s", flush=True)
    return losses, seconds


@torch.no_grad()
def accuracy(model: Spiking, data: tuple[Tensor, Tensor]) -> float:
    right = [(model(x)[0][: len(y)].argmax(1) == y).sum() for x, y in batches(*data, torch.Generator().manual_seed(0))]
    return float(sum(right)) / len(data[1])


def draw(model: Spiking, losses: dict[str, list[float]], seconds: dict[str, list[float]], digit: Tensor) -> Path:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), constrained_layout=True)
    for name, values in losses.items():
        axes[0].plot(range(1, len(values) + 1), values, "o-", label=f"{name}: {min(seconds[name]):.2f} s an epoch")
    axes[0].set(xlabel="epoch", ylabel="loss", title="training")
    axes[0].legend()
    with torch.no_grad():
        spikes = model(digit[None].T.unsqueeze(-1))[1][:, 0]
    axes[1].imshow(digit.reshape(8, 8), cmap="gray_r")
    axes[1].set(xticks=[], yticks=[], title="a digit")
    times, neurons = spikes.nonzero().T
    axes[2].plot(times, neurons, "|", color="black")
    axes[2].set(xlabel="pixel", ylabel="neuron", title="what fires as it is seen")
    path = Path(__file__).parent / "out" / "spiking_digits.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    width, epochs, compared = (32, 3, 1) if quick else (64, 30, 2)
    digits = load_digits()
    pixels, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    mixed = torch.randperm(len(labels))
    tested, trained = mixed[:TESTED], mixed[TESTED:]
    data, unseen = (pixels[trained], labels[trained]), (pixels[tested], labels[tested])
    model = Spiking(width, pcr_fx.scan)
    plain = copy.deepcopy(model)
    plain.run = plain_loop
    print("pcr_fx.scan")
    losses, seconds = train(model, data, epochs)
    print("plain loop")
    others, more = train(plain, data, compared)
    right = accuracy(model, unseen)
    print(f"of digits never seen {100 * right:.1f} % are right")
    path = draw(
        model, {"pcr_fx.scan": losses, "plain loop": others}, {"pcr_fx.scan": seconds, "plain loop": more}, pixels[0]
    )
    print(f"picture: {path}")
    drift = abs(losses[0] - others[0]) / others[0]
    if drift > MOST_DRIFT:
        print(f"FAILED: the losses of the first epoch differ by {100 * drift:.2g} %")
        return 1
    if not quick and right < 0.85:
        print("FAILED: it has not learnt")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
