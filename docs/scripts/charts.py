"""Charts of recorded benchmarks, drawn from `benchmarks/results/*.json`: python docs/scripts/charts.py FOLDER."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
# Grey is legible on white and on black, and nothing is painted behind it.
INK = "#808080"
STYLE = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.transparent": True,
    "legend.frameon": False,
    "font.size": 10,
    "svg.hashsalt": "pcr_fx",
}


def record(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def svg(draw: Callable[[], plt.Figure]) -> str:
    """What `draw` draws, as a text that is the same each time."""
    with plt.rc_context(STYLE):
        figure = draw()
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
    return file.getvalue()


def times_faster() -> plt.Figure:
    """How many times as fast as eager 1,024 residual blocks are, over their width."""
    kernels = record("kernels")
    rows = {row[0]: row[1:] for row in kernels["rows"]}
    ways = {
        "packed against eager": "transform, packed",
        "unpacked against eager": "transform",
        "`torch.compile` against eager": "torch.compile",
    }
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for plot, direction in zip(axes, ("forward", "forward + backward"), strict=True):
        for place, (key, label) in enumerate(ways.items()):
            gains = [float(cell.split("x")[0]) for cell in rows[f"{key}, {direction}"]]
            at = [index + 0.27 * (place - 1) for index in range(len(gains))]
            bars = plot.bar(at, gains, 0.25, color=f"C{place}", label=label)
            plot.bar_label(
                bars, [f"{gain:.0f}" if gain >= 10 else f"{gain:.1f}" for gain in gains], fontsize=6.5, color=INK
            )
        plot.set(yscale="log", title=direction, xticks=range(len(gains)))
        plot.set_xticklabels(kernels["headers"][1:], fontsize=8)
    axes[0].set_ylabel("times as fast as eager")
    figure.legend(
        *axes[0].get_legend_handles_labels(), fontsize=8, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.06)
    )
    figure.tight_layout()
    return figure


def never_slower() -> plt.Figure:
    """`auto` against eager over depth, and against the best of its own solvers."""
    grid = record("never_slower")
    column = grid["headers"].index
    figure, (gains, ratios) = plt.subplots(1, 2, figsize=(9, 3.2))
    for place, direction in enumerate(("forward", "forward + backward")):
        rows = [row for row in grid["rows"] if row[column("direction")] == direction]
        depth = [row[column("L")] * (0.94 + 0.12 * place) for row in rows]
        gains.scatter(depth, [float(row[column("against eager")].rstrip("x")) for row in rows], s=14, label=direction)
        ratios.scatter(depth, [float(row[column("auto / best")].split()[0]) for row in rows], s=14)
    gains.axhline(1, color=INK, linewidth=0.8)
    gains.set(xscale="log", yscale="log", xlabel="blocks", ylabel="times as fast as eager")
    gains.legend(fontsize=8)
    ratios.axhline(1, color=INK, linewidth=0.8)
    ratios.set(xscale="log", xlabel="blocks", ylabel="time of auto / time of the best")
    figure.tight_layout()
    return figure


CHARTS: dict[str, Callable[[], plt.Figure]] = {"times_faster": times_faster, "never_slower": never_slower}


if __name__ == "__main__":
    for name, draw in CHARTS.items():
        (Path(sys.argv[1]) / f"{name}.svg").write_text(svg(draw))
