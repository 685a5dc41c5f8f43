"""Train a residual network as deep as the DeepPCR paper's, 1,024 blocks, four times: what does a training step cost?

The model and its training loop are ordinary PyTorch. All runs start from the same weights and see the same batches:

- `eager`: as it is;
- `compiled`: `torch.compile(model, backend="deeppcr")`, and nothing else changed;
- `packed`: `pcr_fx.transform(model, x, pack_parameters=True, optimizer=optimizer)`;
- `Newton`: the same with `options={"solver": "newton"}`, the method of the paper.

A further run, `control`, is the packed one from weights that differ by one rounding. Training amplifies rounding, so two
right runs drift apart; the control shows how far. The others must not drift much farther from `eager`.

    python examples/train_resnet.py                  # two minutes on two cores
    python examples/train_resnet.py --quick          # 128 blocks, half a minute
    python examples/train_resnet.py --blocks 256 --steps 200
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from torch import Tensor, nn

import pcr_fx

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# How much farther than the control a run may drift from plain PyTorch: all drift exponentially from differences of
# rounding size, so that the ratio of two drifts is worth no more than its order of magnitude.
DRIFT_RATIO = 30.0
# Below this, a difference in loss says nothing however still the control stands.
DRIFT_FLOOR = 1e-4
LEAST_ACCURACY = 0.9
PHASES = ("forward", "backward", "optimizer")
# Each run's name, and its colour, line and width in the picture.
STYLES = {
    "eager": ("0.72", "-", 6.0),
    "compiled": ("C1", "-", 3.0),
    "packed": ("C0", "-", 1.6),
    "Newton": ("C3", ":", 1.8),
}


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


class Progress:
    """Says what is being done, and for how long already, as soon as that is two seconds."""

    def __init__(self, name: str) -> None:
        self.name, self.doing, self.began = name, "", time.perf_counter()
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self._tell, daemon=True)

    def __enter__(self) -> Progress:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self.thread.join()
        self._print("done", "\n")

    def _tell(self) -> None:
        pause = 2.0
        while not self.is_over.wait(pause):
            self._print(self.doing, "" if sys.stdout.isatty() else "\n")
            pause = 0.2 if sys.stdout.isatty() else 10.0

    def _print(self, doing: str, end: str) -> None:
        start = "\r" if sys.stdout.isatty() else ""
        seconds = time.perf_counter() - self.began
        print(f"{start}{f'{self.name}: {doing}, {seconds:.1f} s':<78}".rstrip(" " if end else ""), end=end, flush=True)


@dataclass
class Run:
    """What a training run leaves behind.

    Attributes:
        seconds: of each step, by phase. In the first what is compiled is compiled.
        ends: when each step was over, in seconds after the run began.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[tuple[float, ...]] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    @property
    def phases_ms(self) -> tuple[float, ...]:
        """Medians by phase."""
        return tuple(1e3 * statistics.median(phase) for phase in zip(*self.seconds[1:], strict=True))

    @property
    def step_ms(self) -> float:
        return sum(self.phases_ms)


# What a run makes of a model, its optimizer and a batch: the model to train.
Prepare = Callable[[nn.Module, torch.optim.Optimizer, Tensor], Any]


def train(model: nn.Module, prepare: Prepare, data: Digits, arguments: argparse.Namespace, progress: Progress) -> Run:
    run, clock = Run(), time.perf_counter
    optimizer = torch.optim.Adam(model.parameters(), lr=arguments.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    batches = list(data.batches(arguments.steps, arguments.batch, arguments.seed))
    progress.doing = "reading and compiling the model"
    began = clock()
    trained = prepare(model, optimizer, batches[0][0])
    for number, (x, y) in enumerate(batches):
        times = [clock()]
        loss = nn.functional.cross_entropy(trained(x), y)
        times.append(clock())
        loss.backward()
        times.append(clock())
        optimizer.step()
        optimizer.zero_grad()
        times.append(clock())
        schedule.step()
        run.losses.append(loss.item())
        run.seconds.append(tuple(end - start for start, end in itertools.pairwise(times)))
        run.ends.append(clock() - began)
        progress.doing = f"{number + 1} of {arguments.steps} steps"
    plain = ResNet(arguments.blocks, arguments.width)
    plain.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in trained.state_dict().items()})
    with torch.no_grad():
        # Whatever the training ran through, its weights are those of the plain model.
        run.accuracy = float((plain(data.test_x).argmax(1) == data.test_y).float().mean())
    return run


def ways(arguments: argparse.Namespace) -> dict[str, Prepare]:
    """What is done to the model before it is trained, by the name of the run."""

    def compiled(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Any:
        return torch.compile(model, backend="deeppcr", options=arguments.options)

    def packed(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Any:
        return pcr_fx.transform(model, x, pack_parameters=True, optimizer=optimizer)

    def newton(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Any:
        return pcr_fx.transform(model, x, {"solver": "newton"}, pack_parameters=True, optimizer=optimizer)

    return {
        "eager": lambda model, optimizer, x: model,
        "compiled": compiled,
        "packed": packed,
        "Newton": newton,
        "control": packed,
    }


def one_rounding_off(model: nn.Module) -> nn.Module:
    """A copy whose weights are each the next larger number."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, torch.inf)))
    return moved


def train_all(data: Digits, arguments: argparse.Namespace) -> tuple[dict[str, Run], dict[str, str]]:
    """All runs by name, and what was reported of some."""
    torch.manual_seed(arguments.seed)
    model = ResNet(arguments.blocks, arguments.width)
    runs, reports = {}, {}
    for name, prepare in ways(arguments).items():
        start = one_rounding_off(model) if name == "control" else copy.deepcopy(model)
        made: list[Any] = []

        def kept(*given: Any, prepare: Prepare = prepare, made: list[Any] = made) -> Any:
            made.append(prepare(*given))
            return made[0]

        with Progress(name) as progress:
            runs[name] = train(start, kept, data, arguments, progress)
        if name in ("packed", "Newton"):
            reports[name] = str(pcr_fx.report(made[0]))
    return runs, reports


def differences(runs: dict[str, Run], name: str) -> list[float]:
    """How far a run's losses are from plain PyTorch's, step by step; the control's from those of what it is one of."""
    other = runs["packed" if name == "control" else "eager"]
    return [abs(a - b) for a, b in zip(runs[name].losses, other.losses, strict=True)]


def print_results(runs: dict[str, Run], reports: dict[str, str]) -> None:
    for name, report in reports.items():
        print(f"\n--- {name}\n{report}")
    steps, eager = len(runs["eager"].losses), runs["eager"].step_ms
    shown = sorted({*range(0, steps, max(1, steps // 8)), steps - 1})
    print("\nLoss")
    print(tabulate([(k + 1, *(runs[n].losses[k] for n in STYLES)) for k in shown], ("step", *STYLES), floatfmt=".6f"))
    rows = [
        (
            name,
            *(f"{phase:.2f}" for phase in runs[name].phases_ms),
            f"{runs[name].step_ms:.2f}",
            f"{eager / runs[name].step_ms:.1f}x",
            f"{runs[name].ends[0]:.1f}",
            f"{runs[name].ends[-1]:.1f}",
            f"{100 * runs[name].accuracy:.1f} %",
            f"{max(differences(runs, name)):.0e}",
        )
        for name in STYLES
    ]
    header = (
        "\nrun",
        *(f"{phase}\nms" for phase in PHASES),
        "whole step\nms",
        "against\neager",
        "first step\ndone, s",
        f"{steps} steps\ndone, s",
        "test\naccuracy",
        "largest difference\nin loss",
    )
    print("\n" + tabulate(rows, header, disable_numparse=True))


def save_picture(runs: dict[str, Run], blocks: int, path: Path) -> None:
    """The losses by step and by the clock, what a step is made of, and how far losses lie apart."""
    figure, ((by_step, by_clock), (parts, apart)) = plt.subplots(2, 2, figsize=(11.5, 8))
    draw_losses(by_step, by_clock, runs)
    draw_parts(parts, runs)
    draw_differences(apart, runs)
    for axes in (by_step, by_clock, parts, apart):
        axes.spines[["top", "right"]].set_visible(False)
    faster = runs["eager"].step_ms / runs["packed"].step_ms
    title = f"One network of {blocks:,} blocks, one curve, and a training step that is {faster:.3g} times faster"
    figure.suptitle(title, fontsize=14)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_losses(by_step: Any, by_clock: Any, runs: dict[str, Run]) -> None:
    for name, (colour, line, width) in STYLES.items():
        run = runs[name]
        by_step.plot(range(1, len(run.losses) + 1), run.losses, line, color=colour, linewidth=width, label=name)
        means = [statistics.fmean(run.losses[max(k - 9, 0) : k + 1]) for k in range(len(run.losses))]
        by_clock.plot(run.ends, means, color=colour, linewidth=2.2, label=f"{name}, {run.ends[-1]:.3g} s")
        by_clock.plot(run.ends[-1:], means[-1:], "o", color=colour)
    by_step.set(xlabel="step", ylabel="training loss", yscale="log", title="Step by step they are one curve")
    by_clock.set(xscale="log", yscale="log", title="By the clock they are not (means of 10 steps)")
    by_clock.set(xlabel="seconds, reading and compiling the model included")
    by_step.legend(frameon=False)
    by_clock.legend(frameon=False, loc="lower left")


def draw_parts(axes: Any, runs: dict[str, Run]) -> None:
    """A bar for each run: what a step is made of."""
    names = list(STYLES)[::-1]
    ends = [0.0] * len(names)
    for index, (phase, colour) in enumerate(zip(PHASES, ("#4878a8", "#e49444", "#85b6b2"), strict=True)):
        widths = [runs[name].phases_ms[index] for name in names]
        axes.barh(names, widths, left=ends, color=colour, label=phase, height=0.6)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    eager = runs["eager"].step_ms
    for index, name in enumerate(names):
        step = runs[name].step_ms
        text = f" {step:.3g} ms" + ("" if name == "eager" else f", {eager / step:.3g}x")
        axes.text(ends[index], index, text, va="center", fontsize=11)
    axes.set(xlabel="ms a step", title="What a step is made of", xlim=(0, 1.25 * max(ends)))
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.6, 0.28))


def draw_differences(axes: Any, runs: dict[str, Run]) -> None:
    """The largest so far, of each run."""
    styles = {**STYLES, "control": ("0.5", "--", 0.0)}
    for name, (colour, line, _) in styles.items():
        if name != "eager":
            label = (
                "packed, against itself from weights one rounding off"
                if name == "control"
                else f"{name}, against eager"
            )
            largest = [max(value, 1e-8) for value in itertools.accumulate(differences(runs, name), max)]
            axes.plot(range(1, len(largest) + 1), largest, line, color=colour, label=label, linewidth=1.8)
    axes.set(xlabel="step", yscale="log", title="Largest difference in loss so far: rounding")
    axes.set_ylim(1e-8, max(1e-2, axes.get_ylim()[1]))
    axes.legend(frameon=False, loc="upper left")


def problems(runs: dict[str, Run]) -> list[str]:
    """What is wrong with the outcome, in words; empty when all is well."""
    allowed = max(DRIFT_FLOOR, DRIFT_RATIO * max(differences(runs, "control")))
    found = []
    for name in STYLES:
        drift = max(differences(runs, name))
        if not drift <= allowed:
            found.append(f"the loss of {name} differs from plain PyTorch's by {drift:.1e}, more than {allowed:.1e}")
        if runs[name].accuracy < LEAST_ACCURACY:
            found.append(f"{name} reached a test accuracy of {runs[name].accuracy:.3f}, less than {LEAST_ACCURACY}")
    return found


def conclusion(runs: dict[str, Run], arguments: argparse.Namespace) -> str:
    """What was gained, and how, in one sentence."""
    eager, packed, compiled = (runs[name].step_ms for name in ("eager", "packed", "compiled"))
    return (
        f"A training step of {arguments.blocks:,} blocks takes {packed:.3g} ms packed, where eager PyTorch takes {eager:.3g}: "
        f"{eager / packed:.3g} times faster, with the same losses ({eager / compiled:.3g} times by torch.compile alone), since "
        "one native kernel runs all blocks forward, another one backward, and autograd and Adam see 8 parameters and not "
        f"{4 * arguments.blocks + 4:,}."
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a shorter and shallower run")
    parser.add_argument("--blocks", type=int, help="residual blocks (default 1024, 128 with --quick)")
    parser.add_argument("--width", type=int, default=8, help="size of the state (default %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="training steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="samples a step (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.015)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inner-backend", help="what compiles the rest of the graph (default: pcr_fx's own default)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    arguments = parser.parse_args()
    arguments.blocks = arguments.blocks or (128 if arguments.quick else 1024)
    arguments.options = {"inner_backend": arguments.inner_backend} if arguments.inner_backend else {}
    return arguments


def main() -> int:
    arguments = parse()
    print(
        f"{arguments.blocks:,} residual blocks of width {arguments.width} on scikit-learn's digits, with Adam",
        flush=True,
    )
    runs, reports = train_all(Digits.load(), arguments)
    print_results(runs, reports)
    picture = arguments.out / "train_resnet.png"
    save_picture(runs, arguments.blocks, picture)
    print(f"\nPicture: {picture}")
    found = problems(runs)
    print("\n".join(["NOT AS IT SHOULD BE:", *found]) if found else "\n" + conclusion(runs, arguments))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
