"""The DeepPCR paper's first experiment: a plain MLP, its forward and its backward, over depth and width.

Prints the times of eager PyTorch, of Newton + cyclic reduction and of the choice of `solver="auto"`, and draws the gain
as a heat map. Chains come in through `pcr_fx.transform`, which reads a model in a second where `torch.compile` takes half
a minute at this depth, with packed parameters: handing each of thousands its gradient would take longer than all else.

    python examples/mlp_depth.py
    python examples/mlp_depth.py --quick
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from tabulate import tabulate
from torch import Tensor, nn

import pcr_fx

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class Times:
    """Medians in milliseconds; or how many times faster something is."""

    forward: float
    backward: float

    def over(self, other: Times) -> Times:
        return Times(self.forward / other.forward, self.backward / other.backward)


@dataclass
class Compared:
    """One model: its row of the table, and how many times faster than eager it is by Newton and by `auto`."""

    name: str
    row: tuple[object, ...]
    newton: Times
    auto: Times


def mlp(length: int, width: int) -> nn.Sequential:
    """Linear + Tanh layers with orthogonal weights: signals neither explode nor die out over a thousand layers."""
    layers: list[nn.Module] = []
    for _ in range(length):
        linear = nn.Linear(width, width)
        nn.init.orthogonal_(linear.weight)
        nn.init.normal_(linear.bias, std=0.1)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers)


def measure(model: nn.Module, x: Tensor, repeats: int) -> Times:
    forward, backward = [], []
    for index in range(repeats + 2):
        model.zero_grad()
        start = time.perf_counter()
        loss = model(x).sum()
        middle = time.perf_counter()
        loss.backward()
        if index >= 2:
            forward.append(middle - start)
            backward.append(time.perf_counter() - middle)
    return Times(1e3 * statistics.median(forward), 1e3 * statistics.median(backward))


def error(model: nn.Module, x: Tensor, exact: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - exact).abs().max() / exact.abs().max())


def compare(length: int, width: int, repeats: int) -> Compared:
    torch.manual_seed(0)
    model, x = mlp(length, width), torch.randn(1, width)
    with torch.no_grad():
        exact = model.double()(x.double())
    model.float()
    newton = pcr_fx.transform(model, x, {"solver": "newton"}, pack_parameters=True)
    auto = pcr_fx.transform(model, x, pack_parameters=True)
    eager, fast, chosen = (measure(run, x, repeats) for run in (model, newton, auto))
    chain = newton.report.to_dict()["chains"][0]
    choice = auto.report.to_dict()["chains"][0]
    gains = eager.over(fast)
    row = (
        length,
        width,
        f"{eager.forward:.2f}",
        f"{fast.forward:.2f}",
        f"{chosen.forward:.2f} ({choice['solver_forward']})",
        f"{gains.forward:.1f}x",
        f"{eager.backward:.2f}",
        f"{fast.backward:.2f}",
        f"{chosen.backward:.2f} ({choice['solver_backward']})",
        f"{gains.backward:.1f}x",
        f"{chain['iterations']}" + (" then fell back" if chain["fallbacks"] else ""),
        f"{error(newton, x, exact):.0e} ({error(model, x, exact):.0e})",
    )
    return Compared(f"{length} layers of width {width}", row, gains, eager.over(chosen))


def save_heat_maps(gains: list[list[list[float]]], lengths: list[int], widths: list[int], path: Path) -> None:
    """Two maps, forward and backward; a gain of one, where nothing is won or lost, is white."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    for axis, values, title in zip(axes, gains, ("forward", "backward"), strict=True):
        table = torch.tensor(values).clamp_min(1e-3)
        limit = max(1.0, float(table.log2().abs().max()))
        image = axis.imshow(table.log2(), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                strong = abs(float(table[i, j].log2())) > 0.6 * limit
                axis.text(j, i, f"{value:.1f}x", ha="center", va="center", color="white" if strong else "black")
        axis.set(title=f"{title}: eager's time over Newton's", xlabel="width", ylabel="layers")
        axis.set_xticks(range(len(widths)), [str(w) for w in widths])
        axis.set_yticks(range(len(lengths)), [str(length) for length in lengths])
        figure.colorbar(image, ax=axis, label="log2 of the ratio")
    figure.suptitle("Plain MLP, one sample: DeepPCR against eager PyTorch on the CPU")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def conclusion(every: list[Compared]) -> str:
    """What was gained, and how, in one sentence."""
    forward, auto = (max(every, key=lambda one, name=name: getattr(one, name).forward) for name in ("newton", "auto"))
    backward = max(every, key=lambda one: one.newton.backward)
    return (
        f"At best, Newton's method with cyclic reduction is {forward.newton.forward:.3g} times as fast as eager PyTorch forward "
        f"({forward.name}), and one transposed reduction {backward.newton.backward:.3g} times backward ({backward.name}), since "
        f"both treat all layers at once; what auto takes is {auto.auto.forward:.3g} times as fast forward and "
        f"{auto.auto.backward:.3g} backward ({auto.name}), since on a CPU one call of native code goes through layers faster still."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a smaller grid")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    arguments = parser.parse_args()
    lengths = [16, 128] if arguments.quick else [16, 64, 256, 1024]
    widths = [2, 8] if arguments.quick else [2, 4, 8, 16, 32]
    table: list[list[Compared]] = []
    for length in lengths:
        table.append([])
        for width in widths:
            print(f"{length} layers of width {width} ...", flush=True)
            table[-1].append(compare(length, width, 3 if arguments.quick else 7))
    every = [compared for row in table for compared in row]
    headers = ["layers", "width", "eager", "newton", "auto", "gain", "eager", "newton", "auto", "gain"]
    units = ["", "", *["fwd ms"] * 3, "newton", *["bwd ms"] * 3, "newton"]
    named = [f"{a}\n{b}" for a, b in zip(headers, units, strict=True)]
    print(
        tabulate(
            [compared.row for compared in every],
            [*named, "iterations", "error (eager's)\nagainst float64"],
            disable_numparse=True,
        )
    )
    path = arguments.out / "mlp_depth.png"
    gains = [[[getattr(one.newton, way) for one in row] for row in table] for way in ("forward", "backward")]
    save_heat_maps(gains, lengths, widths, path)
    print(f"\nHeat maps: {path}\n\n{conclusion(every)}")


if __name__ == "__main__":
    main()
