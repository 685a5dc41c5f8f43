"""Train a deep, narrow residual network on real data three times: plain, and through `backend="deeppcr"` twice.

The model is an ordinary module, and all runs start from the same weights and see the same batches:

- `eager`: plain PyTorch;
- `newton`: `torch.compile(model, backend="deeppcr", options={"solver": "newton"})`, the method of the DeepPCR paper;
- `auto`: `torch.compile(model, backend="deeppcr")`, which takes for each direction what its rule expects to be faster.

A fourth run, `control`, is plain PyTorch again, from weights that differ by one rounding. Training amplifies rounding,
so two right runs drift apart; the control shows how far. The compiled runs must not drift much farther.

    python examples/train_resnet.py                  # about two minutes on two cores
    python examples/train_resnet.py --quick          # less than 40 s
    python examples/train_resnet.py --blocks 1024    # as deep as in the paper; compiling takes longer
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
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from torch import Tensor, nn

import pcr_fx

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# How much farther than the control a compiled run may drift from plain PyTorch: all drift exponentially from differences
# of rounding size, so that the ratio of two drifts is worth no more than its order of magnitude.
DRIFT_RATIO = 30.0
# Below this, a difference in loss says nothing however still the control stands.
DRIFT_FLOOR = 1e-4
LEAST_ACCURACY = 0.9


class Block(nn.Module):
    """x + scale (W2 tanh(W1 x + b1) + b2)."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.outer(torch.tanh(self.inner(x)))


class ResNet(nn.Module):
    """A stem, a deep stack of fully connected residual blocks, a head: `[B, 64] -> [B, 10]`."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Linear(64, width)
        self.blocks = nn.ModuleList([Block(width, 5.0 / blocks) for _ in range(blocks)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclass
class Digits:
    """scikit-learn's 8x8 digits, scaled to -1..1, a quarter of them for testing."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def load(cls) -> Digits:
        x, y = load_digits(return_X_y=True)
        train_x, test_x, train_y, test_y = train_test_split(x / 8 - 1, y, test_size=0.25, random_state=0, stratify=y)
        return cls(
            torch.tensor(train_x, dtype=torch.float32),
            torch.tensor(train_y),
            torch.tensor(test_x, dtype=torch.float32),
            torch.tensor(test_y),
        )

    def batches(self, steps: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randint(len(self.train_x), (size,), generator=generator)
            yield self.train_x[chosen], self.train_y[chosen]


@dataclass
class Run:
    """What a training run leaves behind: losses, seconds a step (the first one compiles), test accuracy."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    @property
    def step_ms(self) -> float:
        return 1e3 * statistics.median(self.seconds[1:])


def train(model: nn.Module, call: Callable[[Tensor], Tensor], data: Digits, arguments: argparse.Namespace) -> Run:
    """Train `model`, whose forward is called as `call`."""
    optimiser = torch.optim.Adam(model.parameters(), lr=arguments.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, arguments.steps)
    run = Run()
    for x, y in data.batches(arguments.steps, arguments.batch, arguments.seed):
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(call(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        run.losses.append(loss.item())
        run.seconds.append(time.perf_counter() - start)
    with torch.no_grad():
        # Through the model itself: whatever the training ran through, its weights are the model's.
        run.accuracy = float((model(data.test_x).argmax(1) == data.test_y).float().mean())
    return run


def one_rounding_off(model: nn.Module) -> nn.Module:
    """A copy whose weights are each the next larger number."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, torch.inf)))
    return moved


def train_all(data: Digits, arguments: argparse.Namespace) -> tuple[dict[str, Run], list[str]]:
    """All runs by name, and the reports of the compiled ones."""
    torch.manual_seed(arguments.seed)
    model = ResNet(arguments.blocks, arguments.width)
    runs, reports = {}, []

    def compiled(**options: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        copied = copy.deepcopy(model)
        return copied, torch.compile(copied, backend="deeppcr", options={**options, **arguments.options})

    for name in ("eager", "control", "newton", "auto"):
        print(f"training: {name} ...", flush=True)
        if name in ("eager", "control"):
            copied = copy.deepcopy(model) if name == "eager" else one_rounding_off(model)
            call: Callable[[Tensor], Tensor] = copied
        else:
            copied, call = compiled(solver=name)
        runs[name] = train(copied, call, data, arguments)
        if name in ("newton", "auto"):
            reports.append(f'--- torch.compile(model, backend="deeppcr") with solver="{name}"\n{pcr_fx.report()}')
    return runs, reports


def differences(runs: dict[str, Run], name: str) -> list[float]:
    """How far a run's losses are from plain PyTorch's, step by step."""
    return [abs(a - b) for a, b in zip(runs[name].losses, runs["eager"].losses, strict=True)]


def print_results(runs: dict[str, Run], reports: list[str]) -> None:
    print("\n" + "\n\n".join(reports))
    steps = len(runs["eager"].losses)
    shown = sorted({*range(0, steps, max(1, steps // 10)), steps - 1})
    rows = [(step + 1, *(run.losses[step] for run in runs.values())) for step in shown]
    print("\nLoss\n" + tabulate(rows, ("step", *runs), floatfmt=".6f"))
    eager = runs["eager"].step_ms
    table = [
        (
            name,
            f"{run.step_ms:.1f}",
            f"{eager / run.step_ms:.2f}x",
            f"{run.seconds[0]:.1f}",
            f"{100 * run.accuracy:.1f} %",
            f"{max(differences(runs, name)):.1e}",
        )
        for name, run in runs.items()
    ]
    header = ("run", "ms a step", "against eager", "first step, s", "test accuracy", "largest difference in loss")
    print("\n" + tabulate(table, header, disable_numparse=True))


def save_curves(runs: dict[str, Run], path: Path) -> None:
    """Loss curves on top of each other, and their distance from plain PyTorch."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(3, 2))
    styles = {"eager": ("0.75", "-", 5), "newton": ("C0", "-", 1.8), "auto": ("C1", "--", 1.8)}
    steps = range(1, len(runs["eager"].losses) + 1)
    for name, (colour, line, width) in styles.items():
        label = f"{name} ({runs[name].step_ms:.0f} ms a step)"
        top.plot(steps, runs[name].losses, color=colour, linestyle=line, linewidth=width, label=label)
    top.set(ylabel="training loss", yscale="log", title="Same model, same batches, three ways to evaluate it")
    top.legend(frameon=False)
    for name, colour in (("control", "0.6"), ("newton", "C0"), ("auto", "C1")):
        label = "eager, weights one rounding off" if name == "control" else name
        bottom.plot(steps, [max(d, 1e-9) for d in differences(runs, name)], color=colour, label=label, linewidth=1.2)
    bottom.set(xlabel="step", ylabel="|loss - eager's loss|", yscale="log")
    bottom.legend(frameon=False)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def problems(runs: dict[str, Run]) -> list[str]:
    """What is wrong with the outcome, in words; empty when all is well."""
    allowed = max(DRIFT_FLOOR, DRIFT_RATIO * max(differences(runs, "control")))
    found = []
    for name in ("newton", "auto"):
        drift = max(differences(runs, name))
        print(f"{name}: largest difference in loss {drift:.1e}, allowed {allowed:.1e}")
        if not drift <= allowed:
            found.append(f"the loss of {name} differs from plain PyTorch's by {drift:.1e}, more than {allowed:.1e}")
    for name, run in runs.items():
        if run.accuracy < LEAST_ACCURACY:
            found.append(f"{name} reached a test accuracy of {run.accuracy:.3f}, less than {LEAST_ACCURACY}")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a shorter and shallower run")
    parser.add_argument("--blocks", type=int, help="residual blocks (default 512, 128 with --quick)")
    parser.add_argument("--width", type=int, default=8, help="size of the state (default %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps (default 150, 100 with --quick)")
    parser.add_argument("--batch", type=int, default=32, help="samples a step (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.015)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inner-backend", help="what compiles the rest of the graph (default: pcr_fx's own default)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    arguments = parser.parse_args()
    arguments.blocks = arguments.blocks or (128 if arguments.quick else 512)
    arguments.steps = arguments.steps or (100 if arguments.quick else 150)
    arguments.options = {"inner_backend": arguments.inner_backend} if arguments.inner_backend else {}
    return arguments


def main() -> int:
    arguments = parse()
    print(f"{arguments.blocks} residual blocks of width {arguments.width} on scikit-learn's digits")
    runs, reports = train_all(Digits.load(), arguments)
    print_results(runs, reports)
    picture = arguments.out / "train_resnet.png"
    save_curves(runs, picture)
    print(f"\nCurves: {picture}")
    found = problems(runs)
    print("\n".join(["NOT AS IT SHOULD BE:", *found]) if found else "The curves agree, and all runs have learned.")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
