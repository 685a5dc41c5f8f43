"""Train a GRU on long real sequences, the rows of a photograph, unrolled in Python: plain, and through pcr_fx.

The network walks along a row of scikit-learn's photograph, 640 pixels, sees brightness, and says the colour. Its loop is
an ordinary one. All runs start from the same weights and see the same rows:

- `eager`: plain PyTorch;
- `torch.compile`: `torch.compile(model, backend="deeppcr")`;
- `transform`: `pcr_fx.transform(model, x)`, and again with `solver="newton"`, the method of the DeepPCR paper.

`control` is plain PyTorch from weights that differ by one rounding, which shows how far two right runs drift apart.
Last, the fast model is trained ten times longer, and colours rows that no training has seen.

    python examples/rnn_sequence.py            # some two minutes on two cores
    python examples/rnn_sequence.py --quick    # less than 45 s
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_sample_image
from tabulate import tabulate
from torch import Tensor, nn
from train_resnet import DRIFT_RATIO, one_rounding_off

import pcr_fx

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# How much larger than plain PyTorch's an error against float64 may be, and what is left to rounding in any case: what
# is around the chain `torch.compile` sums up in an order of its own, over some ten thousand pixels.
ERROR_RATIO, ERROR_FLOOR = 10.0, 1e-5
# Below this, a difference in loss says nothing however still the control stands: losses are some 1e-2 in float32.
DRIFT_FLOOR = 1e-6


class Colours(nn.Module):
    """A GRU along rows of pixels: what is seen of each `[T, B, 4]` to its colour `[T, B, 3]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.cell = nn.GRUCell(4, width)
        self.head = nn.Linear(width, 3)

    def forward(self, seen: Tensor) -> Tensor:
        state = seen.new_zeros(seen.shape[1], self.width)
        states = []
        for pixel in seen.unbind(0):
            state = self.cell(pixel, state)
            states.append(state)
        return seen[..., 1:2] + self.head(torch.stack(states))


@dataclass
class Photograph:
    """scikit-learn's china.jpg: `seen` `[640, 425, 4]` and `colour` `[640, 425, 3]`, each row a sequence, in -1..1.

    Of each pixel, the brightness of that above, of itself and of that below is seen, and the height in the picture.
    """

    seen: Tensor
    colour: Tensor

    @classmethod
    def load(cls, steps: int) -> Photograph:
        image = torch.tensor(load_sample_image("china.jpg"), dtype=torch.float32)[:, :steps] / 127.5 - 1
        grey = image @ torch.tensor([0.299, 0.587, 0.114])  # luma, ITU-R BT.601
        height = torch.linspace(1, -1, len(grey))[1:-1, None].expand(-1, grey.shape[1])
        seen = torch.stack([grey[:-2], grey[1:-1], grey[2:], height], -1)
        return cls(seen.transpose(0, 1).contiguous(), image[1:-1].transpose(0, 1).contiguous())

    @property
    def held_out(self) -> Tensor:
        """Which rows no training sees: every fourth."""
        return torch.arange(self.seen.shape[1]) % 4 == 2

    def batches(self, steps: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        rows = torch.arange(self.seen.shape[1])[~self.held_out]
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = rows[torch.randint(len(rows), (size,), generator=generator)]
            yield self.seen[:, chosen], self.colour[:, chosen]


@dataclass
class Run:
    """What a way leaves behind.

    Attributes:
        first: seconds until its first gradient: reading, compiling, and one call.
        losses, seconds: of each training step after that.
        forward: seconds of a forward alone.
        errors: of the output and the gradient before training, against float64.
    """

    first: float = 0.0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    forward: float = 0.0
    errors: tuple[float, float] = (0.0, 0.0)
    report: str = ""

    @property
    def step_ms(self) -> float:
        return 1e3 * statistics.median(self.seconds)


Call = Callable[[Tensor], Tensor]


def train(
    model: nn.Module, call: Call, batches: Iterator[tuple[Tensor, Tensor]], learning_rate: float, run: Run
) -> None:
    """Train `model`, whose forward is called as `call`."""
    optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for seen, colour in batches:
        start = time.perf_counter()
        loss = nn.functional.mse_loss(call(seen), colour)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        run.losses.append(loss.item())
        run.seconds.append(time.perf_counter() - start)


def gradients(model: nn.Module, call: Call, seen: Tensor, colour: Tensor) -> tuple[Tensor, Tensor]:
    """What the model says, and the gradient of its loss with respect to all parameters, as one vector."""
    said = call(seen)
    found = torch.autograd.grad(nn.functional.mse_loss(said, colour), list(model.parameters()))
    return said.detach(), torch.cat([gradient.flatten() for gradient in found])


def forward_seconds(call: Call, seen: Tensor, repeats: int = 7) -> float:
    times = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            call(seen)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def ways(model: nn.Module, seen: Tensor) -> Iterator[tuple[str, nn.Module, Call, Callable[[], object] | None]]:
    """Each way's name, model, call and report; all models start from the same weights."""
    yield "eager", (plain := copy.deepcopy(model)), plain, None
    yield "control", (moved := one_rounding_off(model)), moved, None
    copied = copy.deepcopy(model)
    yield "torch.compile", copied, torch.compile(copied, backend="deeppcr"), pcr_fx.report
    for name, options in (("transform", {}), ("transform, newton", {"solver": "newton"})):
        fast = pcr_fx.transform(copy.deepcopy(model), seen, options)
        yield name, fast, fast, lambda fast=fast: fast.report


def batches_of(photograph: Photograph, arguments: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    return photograph.batches(arguments.steps, arguments.batch, arguments.seed)


def run_all(photograph: Photograph, arguments: argparse.Namespace) -> dict[str, Run]:
    """Each way measured and trained."""
    torch.manual_seed(arguments.seed)
    model = Colours(arguments.width)
    seen, colour = next(photograph.batches(1, arguments.batch, arguments.seed + 1))
    exact = copy.deepcopy(model).double()
    true_said, true_gradient = gradients(exact, exact, seen.double(), colour.double())
    runs, start = {}, time.perf_counter()
    for name, copied, call, report in ways(model, seen):
        print(f"training: {name} ...", flush=True)
        said, gradient = gradients(copied, call, seen, colour)
        run = runs[name] = Run(first=time.perf_counter() - start)
        run.errors = relative(said, true_said), relative(gradient, true_gradient)
        train(copied, call, batches_of(photograph, arguments), arguments.learning_rate, run)
        run.report = str(report()) if report is not None else ""
        run.forward = forward_seconds(call, seen)
        start = time.perf_counter()
    return runs


def relative(value: Tensor, exact: Tensor) -> float:
    """The largest error, relative to the largest value."""
    return float((value - exact).abs().max() / exact.abs().max())


def colour_held_out(photograph: Photograph, arguments: argparse.Namespace) -> tuple[Tensor, Run]:
    """The held-out rows as the fast model colours them once it was trained ten times longer, and that training."""
    torch.manual_seed(arguments.seed)
    seen = photograph.seen[:, photograph.held_out]
    fast = pcr_fx.transform(Colours(arguments.width), seen[:, : arguments.batch])
    run = Run()
    batches = photograph.batches(10 * arguments.steps, arguments.batch, arguments.seed)
    train(fast, fast, batches, arguments.learning_rate, run)
    with torch.no_grad():
        return fast(seen), run


def differences(runs: dict[str, Run], name: str) -> list[float]:
    """How far a run's losses are from plain PyTorch's, step by step."""
    return [abs(a - b) for a, b in zip(runs[name].losses, runs["eager"].losses, strict=True)]


def print_results(runs: dict[str, Run]) -> None:
    for name, run in runs.items():
        if run.report:
            print(f"\n--- {name}\n{run.report}")
    eager = runs["eager"]
    shown = sorted({*range(0, len(eager.losses), max(1, len(eager.losses) // 8)), len(eager.losses) - 1})
    losses = [(step + 1, *(run.losses[step] for run in runs.values())) for step in shown]
    print("\nLoss\n" + tabulate(losses, ("step", *runs), floatfmt=".6f"))
    rows = [
        (
            name,
            f"{run.first:.1f}",
            f"{1e3 * run.forward:.1f}",
            f"{eager.forward / run.forward:.1f}x",
            f"{run.step_ms:.1f}",
            f"{eager.step_ms / run.step_ms:.1f}x",
            f"{run.errors[0]:.0e}, {run.errors[1]:.0e}",
            f"{max(differences(runs, name)):.0e}",
        )
        for name, run in runs.items()
    ]
    header = ("run", "first\ngradient, s", "forward,\nms", "against\neager", "training\nstep, ms", "against\neager")
    header += ("error against float64:\noutput, gradient", "largest difference\nin loss")
    print("\n" + tabulate(rows, header, disable_numparse=True))


def save_picture(runs: dict[str, Run], photograph: Photograph, coloured: Tensor, path: Path) -> None:
    """Loss curves and their distances, one row held out, and all of them as pictures: as seen, as said, as they are."""
    true, seen = photograph.colour[:, photograph.held_out], photograph.seen[:, photograph.held_out]
    figure, axes = plt.subplot_mosaic(
        [["loss"] * 3 + ["drift"] * 3, ["row"] * 6, ["seen"] * 2 + ["said"] * 2 + ["true"] * 2],
        figsize=(12, 9.5),
        height_ratios=(3, 3, 3),
    )
    lines = {"eager": ("0.75", "-", 5), "torch.compile": ("C0", "-", 2.5), "transform": ("C1", "--", 1.8)}
    for name, (colour, line, width) in (lines | {"transform, newton": ("C2", ":", 1.5)}).items():
        label = f"{name} ({runs[name].step_ms:.0f} ms a step)"
        steps = range(1, len(runs[name].losses) + 1)
        axes["loss"].plot(steps, runs[name].losses, color=colour, linestyle=line, linewidth=width, label=label)
    axes["loss"].set(xlabel="step", ylabel="training loss", yscale="log", title="Same model, same rows")
    for name, run in runs.items():
        if name != "eager":
            colour = {"control": "0.6", "torch.compile": "C0", "transform": "C1"}.get(name, "C2")
            label = "eager, weights one rounding off" if name == "control" else name
            far = differences(runs, name)
            axes["drift"].plot(range(1, len(run.losses) + 1), far, color=colour, label=label, linewidth=1.2)
    axes["drift"].set(xlabel="step", ylabel="|loss - eager's loss|", title="Distance from eager")
    # The row whose colours vary most: one through the building, and not one of sky.
    index = int((true - seen[..., 1:2]).std(0).mean(-1).argmax())
    number = 1 + int(photograph.held_out.nonzero()[index])
    for channel, colour in ((0, "C3"), (2, "C0")):
        name = ("red", "green", "blue")[channel]
        excess = [(x[:, index, channel] - seen[:, index, 1]) for x in (true, coloured)]
        axes["row"].plot(excess[0], color=colour, linewidth=0.8, alpha=0.5, label=f"{name}, true")
        axes["row"].plot(excess[1], color=colour, linewidth=1.5, label=f"{name}, by the GRU")
    axes["row"].set(xlabel="pixel", ylabel="colour - brightness", title=f"Row {number}, held out")
    pictures = {"seen": seen[..., 1:2].expand_as(true), "said": coloured, "true": true}
    titles = {"seen": "All rows held out, as seen", "said": "as coloured by the GRU", "true": "as they are"}
    for name, picture in pictures.items():
        axes[name].imshow((picture.transpose(0, 1).clamp(-1, 1) + 1) / 2, aspect=4, interpolation="nearest")
        axes[name].set_title(titles[name])
        axes[name].axis("off")
    for name in ("loss", "drift", "row"):
        axes[name].legend(frameon=False, fontsize=8, ncols=1 if name != "row" else 4)
        axes[name].spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def problems(runs: dict[str, Run]) -> list[str]:
    """What is wrong with the outcome, in words; empty when all is well."""
    allowed = max(DRIFT_FLOOR, DRIFT_RATIO * max(differences(runs, "control")))
    found = []
    for name, run in runs.items():
        if name in ("eager", "control"):
            continue
        drift = max(differences(runs, name))
        if not drift <= allowed:
            found.append(f"the loss of {name} differs from plain PyTorch's by {drift:.1e}, more than {allowed:.1e}")
        for what, error, eager in zip(("output", "gradient"), run.errors, runs["eager"].errors, strict=True):
            if not error <= max(ERROR_FLOOR, ERROR_RATIO * eager):
                found.append(f"the {what} of {name} has an error of {error:.1e} and plain PyTorch's {eager:.1e}")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="shorter rows, fewer training steps")
    parser.add_argument("--length", type=int, help="pixels of a row (default 640, which is all; 256 with --quick)")
    parser.add_argument("--width", type=int, default=16, help="size of the state (default %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps of each run (default 100, 20 with --quick)")
    parser.add_argument("--batch", type=int, default=16, help="rows a step (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    arguments = parser.parse_args()
    arguments.length = arguments.length or (256 if arguments.quick else 640)
    arguments.steps = arguments.steps or (20 if arguments.quick else 100)
    return arguments


def main() -> int:
    arguments = parse()
    photograph = Photograph.load(arguments.length)
    print(f"A GRU of width {arguments.width} along rows of {len(photograph.seen)} pixels, {arguments.batch} at a time")
    runs = run_all(photograph, arguments)
    print_results(runs)
    coloured, longer = colour_held_out(photograph, arguments)
    true = photograph.colour[:, photograph.held_out]
    grey = photograph.seen[:, photograph.held_out, 1:2]
    said = float(nn.functional.mse_loss(coloured, true))
    plain = float(nn.functional.mse_loss(grey.expand_as(true), true))
    print(
        f"\nThe fast model, trained for {len(longer.losses)} steps in {sum(longer.seconds):.0f} s: mean square error on rows "
        f"held out {said:.4f}; of the grey picture {plain:.4f}"
    )
    picture = arguments.out / "rnn_sequence.png"
    save_picture(runs, photograph, coloured, picture)
    print(f"Curves and colours: {picture}")
    found = problems(runs)
    if not said < plain:
        found.append("the colours are no better than grey")
    print("\n".join(["NOT AS IT SHOULD BE:", *found]) if found else "The curves agree, and colours were learned.")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
