"""Train a small diffusion model on real digits, and draw with it: T denoising steps one after another, or all at once.

`sample` is an ordinary function with an ordinary loop. It is read through `torch.compile(sample, backend="deeppcr")` with
nothing else changed, and through `pcr_fx.transform` with each solver: its steps are one chain, whose blocks share the
denoiser's weights and differ in the time, the coefficients and the noise. The noise is drawn up front, so that every way
has to draw the same digits, sample by sample, and the example fails where one does not.

    python examples/diffusion_digits.py            # 1000 steps: some minutes on two cores
    python examples/diffusion_digits.py --quick    # 50 steps: less than 45 s
    python examples/diffusion_digits.py --ways auto newton
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import trange

import pcr_fx

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Pixels lie in -1..1 and real digits have 17 grey levels, 0.125 apart. Rounding is amplified on the way through a
# thousand steps; a hundredth of a level is far more than that, and nobody sees it.
TOLERANCE = 0.00125


def ways(count: int) -> dict[str, dict[str, object]]:
    """Every way to draw in `count` steps but the plain loop: the options of pcr_fx, nothing else. `auto` has none.

    Picard's iteration (for diffusion: Shih et al., arXiv 2305.16317, in windows as well) is exact after as many
    iterations as there are steps at the latest, and is allowed them.
    """
    window = max(10, count // 10)
    return {
        "auto": {},
        "sequential": {"solver": "sequential"},
        "newton": {"solver": "newton"},
        "newton, PyTorch's ops": {"solver": "newton", "kernels": False},
        "newton, windows": {"solver": "newton", "window": window},
        "quasi-newton": {"solver": "quasi-newton"},
        "picard": {"solver": "picard", "max_iterations": count},
        "picard, windows": {"solver": "picard", "window": window, "max_iterations": count},
        "jacobi": {"solver": "jacobi"},
    }


class Denoiser(nn.Module):
    """A narrow MLP that predicts v from a noisy image `[B, 64]` and the embedding of its time `[B, 16]` or `[16]`."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(64, hidden)
        self.time = nn.Linear(16, hidden)
        self.middle = nn.Linear(hidden, hidden)
        self.outer = nn.Linear(hidden, 64)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = nn.functional.silu(self.inner(x) + self.time(embedding))
        h = h + nn.functional.silu(self.middle(h))
        return self.outer(h)


def embed(time: Tensor) -> Tensor:
    """Sines and cosines of a time in 0..1, at eight frequencies: `[...] -> [..., 16]`."""
    angle = time[..., None] * (math.pi / 2) * 2 ** torch.arange(8.0)
    return torch.cat([angle.sin(), angle.cos()], -1)


class Steps(NamedTuple):
    """What differs from step to step, in the order of drawing: `embedding` `[T, 16]`, the coefficients `[T]`."""

    embedding: Tensor
    keep: Tensor
    move: Tensor
    spread: Tensor

    @classmethod
    def of(cls, count: int, eta: float) -> Steps:
        """DDIM for `eta` = 0, DDPM for `eta` = 1, both from Song et al., arXiv 2010.02502, equations 12 and 16.

        x(t) = a(t) clean + s(t) noise with a = cos(pi t / 2), s = sin(pi t / 2). The model predicts v = a noise - s clean
        (Salimans & Ho, arXiv 2202.00512, appendix D), so that clean = a x - s v and noise = s x + a v.
        """
        times = torch.linspace(1, 0, count + 1, dtype=torch.float64)
        a, s = (times * math.pi / 2).cos(), (times * math.pi / 2).sin()
        s[-1] = 0.0
        now, then = slice(None, -1), slice(1, None)
        spread = eta * (s[then] / s[now]) * (1 - (a[now] / a[then]) ** 2).sqrt()
        direct = (s[then] ** 2 - spread**2).clamp_min(0).sqrt()
        keep, move = a[then] * a[now] + direct * s[now], direct * a[now] - a[then] * s[now]
        return cls(embed(times[now].float()), keep.float(), move.float(), spread.float())


def sample(model: nn.Module, x: Tensor, noise: Tensor, steps: Steps) -> Tensor:
    """From noise `x` `[B, 64]` to digits `[B, 64]`, one step after another; `noise` `[T, B, 64]` is drawn beforehand."""
    for t in range(len(noise)):
        v = model(x, steps.embedding[t])
        x = steps.keep[t] * x + steps.move[t] * v + steps.spread[t] * noise[t]
    return x


class Sampler(nn.Module):
    """`sample` as a module, which is what `pcr_fx.transform` takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, noise: Tensor, steps: Steps) -> Tensor:
        return sample(self.model, x, noise, steps)


def load_images() -> Tensor:
    """scikit-learn's 1797 digits `[1797, 64]`, scaled to -1..1, in a random order."""
    images, _ = load_digits(return_X_y=True)
    return torch.tensor(images / 8 - 1, dtype=torch.float32)[torch.randperm(len(images))]


def train(images: Tensor, arguments: argparse.Namespace) -> nn.Module:
    """A denoiser whose weights are the moving average of those trained."""
    model = Denoiser(arguments.hidden)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, arguments.training_steps)
    for _ in trange(arguments.training_steps, desc="training the denoiser", disable=None):
        clean = images[torch.randint(len(images), (256,))]
        times, noise = torch.rand(256), torch.randn_like(clean)
        a, s = (times * math.pi / 2).cos()[:, None], (times * math.pi / 2).sin()[:, None]
        loss = nn.functional.mse_loss(model(a * clean + s * noise, embed(times)), a * noise - s * clean)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        average.update_parameters(model)
    return average.module


@dataclass
class Drawn:
    """What one way made of one batch: the digits, seconds of the first and the second call, its chain of the report."""

    digits: Tensor
    first: float
    again: float
    chain: dict[str, object] | None = None
    report: str = ""


Draw = Callable[[Tensor, Tensor, Steps], Tensor]


def timed(draw: Draw, *inputs: object) -> tuple[Tensor, float]:
    start = time.perf_counter()
    digits = draw(*inputs)  # type: ignore[arg-type]
    return digits, time.perf_counter() - start


def prepare(model: nn.Module, name: str, inputs: tuple[Tensor, Tensor, Steps]) -> tuple[Draw, Callable[[], object]]:
    """A way to draw, and what tells its report. `auto` is `torch.compile` and nothing else.

    The others go through `transform`, which reads the same loop in a tenth of the time.
    """
    if name == "auto":
        compiled = torch.compile(sample, backend="deeppcr")
        return lambda *inputs: compiled(model, *inputs), pcr_fx.report
    fast = pcr_fx.transform(Sampler(model), inputs, ways(len(inputs[1]))[name])
    return fast, lambda: fast.report


def draw_all(
    model: nn.Module, samplers: dict[str, Steps], x: Tensor, noise: Tensor, names: list[str]
) -> tuple[dict[tuple[str, str], Drawn], Draw | None]:
    """What each way makes of one batch, by sampler and way; and the draw of `auto`, to go on with."""
    results, auto = {}, None
    exact = Sampler(copy.deepcopy(model).double())
    for sampler, steps in samplers.items():
        digits, first = timed(Sampler(model), x, noise, steps)
        results[sampler, "eager"] = Drawn(digits, first, timed(Sampler(model), x, noise, steps)[1])
        inputs = x.double(), noise.double(), Steps(*(table.double() for table in steps))
        digits, first = timed(exact, *inputs)
        results[sampler, "eager, float64"] = Drawn(digits.float(), first, timed(exact, *inputs)[1])
    for name in names:
        print(f"drawing: {name} ...", flush=True)
        start = time.perf_counter()
        draw, report = prepare(model, name, (x, noise, next(iter(samplers.values()))))
        for sampler, steps in samplers.items():
            timed(draw, x, noise, steps)
            first = time.perf_counter() - start
            digits, again = timed(draw, x, noise, steps)
            chains = report().to_dict()["chains"]
            if len(chains) != 1:
                raise SystemExit(f"{name}: {len(chains)} chains where there should be one\n{report()}")
            results[sampler, name] = Drawn(digits, first, again, chains[0], str(report()))
            start = time.perf_counter()
        auto = draw if name == "auto" else auto
    return results, auto


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 500) -> float:
    """The sliced 2-Wasserstein distance of two sets `[N, d]` of the same size (Bonneel et al., 2015, section 3).

    The root mean square, over random directions on the unit sphere and over ranks, of the differences between the sorted
    projections of the sets.
    """
    generator = torch.Generator().manual_seed(0)
    lines = nn.functional.normalize(torch.randn(a.shape[1], directions, generator=generator), dim=0)
    return float(((a @ lines).sort(0).values - (b @ lines).sort(0).values).square().mean().sqrt())


def by_sample(digits: Tensor, reference: Tensor) -> Tensor:
    """The largest difference of each sample `[B]`."""
    return (digits - reference).abs().amax(1)


def print_ways(results: dict[tuple[str, str], Drawn], sampler: str, size: tuple[int, int]) -> None:
    """One sampler's table."""
    count, batch = size
    rows = []
    eager = results[sampler, "eager"]
    for (of, name), drawn in results.items():
        if of != sampler:
            continue
        row = [name, "the plain loop", "", "", count]
        if drawn.chain is not None:
            chain = drawn.chain
            solver = f"{chain['solver_forward']}{' (kernel)' if chain['native_forward'] else ''}"
            if chain["fallbacks"]:
                solver += ", then block by block"
            row[1:] = [solver, chain["iterations"], f"{chain['residual']:.0e}", chain["sequential_depth_after"]]
        differences = by_sample(drawn.digits, eager.digits)
        far = f"{float(differences.median()):.0e}, {float(differences.max()):.0e}"
        distance = f"{sliced_wasserstein(drawn.digits, eager.digits):.0e}"
        rows.append([*row, f"{drawn.first:.1f}", f"{1e3 * drawn.again:.0f}", far, distance])
    header = ("way", "what ran", "itera-\ntions", "residual", "sequential\ndepth", "first\ncall, s", "again,\nms")
    header += ("from eager by sample:\nmedian, largest", "sliced W2\nfrom eager's")
    print(f"\n{sampler}, {batch} digits in {count} steps\n" + tabulate(rows, header, disable_numparse=True))


def print_failures(results: dict[tuple[str, str], Drawn]) -> None:
    """Why ways were given up, in the report's own words."""
    for (sampler, name), drawn in results.items():
        if drawn.chain is not None and drawn.chain["fallbacks"]:
            print(f"{sampler}, {name}: given up, since {drawn.chain['fallback_reason']}")


def print_sets(
    model: nn.Module, auto: Draw, samplers: dict[str, Steps], images: Tensor, batch: int, batches: int
) -> None:
    """Many batches by the plain loop and by `auto`, as sets, against as many real digits; and those against others."""
    real, others = images[: batch * batches], images[batch * batches : 2 * batch * batches]
    rows = [["real digits, others", "", f"{sliced_wasserstein(real, others):.3f}", ""]]
    for sampler, steps in samplers.items():
        inputs = [(torch.randn(batch, 64), torch.randn(len(steps.keep), batch, 64), steps) for _ in range(batches)]
        sets = {}
        for name, draw in (("eager", Sampler(model)), ("auto", auto)):
            drawn = [timed(draw, *each) for each in inputs]
            sets[name] = torch.cat([digits for digits, _ in drawn])
            between = f"{sliced_wasserstein(sets[name], sets['eager']):.0e}"
            milliseconds = 1e3 * statistics.median(seconds for _, seconds in drawn)
            rows.append(
                [f"{sampler}, {name}", f"{milliseconds:.0f}", f"{sliced_wasserstein(sets[name], real):.3f}", between]
            )
    header = ("set", "ms a batch", "sliced W2\nfrom real digits", "sliced W2\nfrom eager's set")
    print(f"\nSets of {len(real)} digits, {batches} batches\n" + tabulate(rows, header, disable_numparse=True))


def grid(images: Tensor) -> Tensor:
    """Images `[B, 64]` side by side, a frame around each."""
    columns = math.ceil(math.sqrt(len(images)))
    tiles = nn.functional.pad(images.view(-1, 8, 8), (0, 1, 0, 1), value=0.2)
    tiles = torch.cat([tiles, tiles.new_full((-len(tiles) % columns, 9, 9), 0.2)])
    return tiles.view(-1, columns, 9, 9).transpose(1, 2).reshape(-1, 9 * columns)[:-1, :-1]


def save_images(results: dict[tuple[str, str], Drawn], samplers: list[str], real: Tensor, path: Path) -> None:
    """The same batch by every way, a row of grids for each sampler, and real digits in front."""
    names = [name for sampler, name in results if sampler == samplers[0]]
    columns = math.ceil((len(names) + 1) / 2)
    figure, axes = plt.subplots(2 * len(samplers), columns, figsize=(2 * columns, 4.7 * len(samplers)), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for index, sampler in enumerate(samplers):
        eager = results[sampler, "eager"].digits
        panels = [("real digits", real[: len(eager)], "")]
        for name in names:
            drawn = results[sampler, name]
            far = float(by_sample(drawn.digits, eager).max())
            note = "the plain loop" if name == "eager" else f"within {far:.0e}"
            panels.append((f"{sampler}, {name}", drawn.digits, note))
        for axis, (title, images, note) in zip(axes[2 * index : 2 * index + 2].flat, panels, strict=False):
            axis.imshow(grid(images), cmap="gray", vmin=-1, vmax=1)
            axis.set_title(f"{title}\n{note}", fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def farthest(results: dict[tuple[str, str], Drawn]) -> dict[tuple[str, str], float]:
    """How far any sample of each way lies from the plain loop's."""
    return {
        (sampler, name): float(by_sample(drawn.digits, results[sampler, "eager"].digits).max())
        for (sampler, name), drawn in results.items()
    }


def parse() -> argparse.Namespace:
    names = list(ways(1))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer steps, a shorter training")
    parser.add_argument("--steps", type=int, help="denoising steps T (default 1000, 50 with --quick)")
    parser.add_argument("--batch", type=int, default=8, help="digits drawn together (default %(default)s)")
    parser.add_argument("--batches", type=int, default=16, help="batches of the sets compared (default %(default)s)")
    parser.add_argument("--hidden", type=int, default=96, help="width of the denoiser (default %(default)s)")
    parser.add_argument("--training-steps", type=int, help="default 15000, 1500 with --quick")
    parser.add_argument("--ways", nargs="+", choices=names, default=names, metavar="WAY", help=", ".join(names))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or (50 if arguments.quick else 1000)
    arguments.training_steps = arguments.training_steps or (1500 if arguments.quick else 15000)
    return arguments


def main() -> int:
    arguments = parse()
    torch.manual_seed(arguments.seed)
    images = load_images()
    model = train(images, arguments)
    samplers = {"DDIM": Steps.of(arguments.steps, eta=0.0), "DDPM": Steps.of(arguments.steps, eta=1.0)}
    x, noise = torch.randn(arguments.batch, 64), torch.randn(arguments.steps, arguments.batch, 64)
    with torch.no_grad():
        results, auto = draw_all(model, samplers, x, noise, arguments.ways)
        if auto is not None:
            drawn = results["DDIM", "auto"]
            print(f'\n--- torch.compile(sample, backend="deeppcr")\n{drawn.report}')
        for sampler in samplers:
            print_ways(results, sampler, (arguments.steps, arguments.batch))
        print_failures(results)
        if auto is not None:
            print_sets(model, auto, samplers, images, arguments.batch, arguments.batches)
    if auto is not None and drawn.chain is not None:
        print(f"\nauto took {drawn.chain['solver_forward']}, because: {drawn.chain['reason']}")
    picture = arguments.out / "diffusion_digits.png"
    save_images(results, list(samplers), images, picture)
    print(f"\nDigits: {picture}")
    far = farthest(results)
    found = [f"{' '.join(way)}: a sample differs by {each:.1e}" for way, each in far.items() if not each <= TOLERANCE]
    well = f"Every way drew the same digits: all samples lie within {max(far.values()):.0e} of the plain loop's"
    print("\n".join(["NOT AS IT SHOULD BE:", *found]) if found else f"{well} ({TOLERANCE} are allowed).")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
