"""Pictures of a run, where matplotlib is installed."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.gpu.record import Row, Section


def _numbers(row: Row) -> dict[str, int]:
    """`"forward, L = 256, w = 4, B = 1 ..."` -> `{"L": 256, "w": 4, "B": 1}`."""
    parts = (part.split(" = ") for part in row.what.split(" (")[0].split(", ")[1:])
    return {name: int(value) for name, value in parts}


def draw_growth(section: Section, file: Path) -> None:
    """Time over length, Newton and block by block, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        rows = [row for row in section.rows if row.what.startswith(direction)]
        lengths = [_numbers(row)["L"] for row in rows]
        axis.plot(lengths, [row.ours_us for row in rows], "o-", label="Newton and reduction")
        axis.plot(lengths, [row.theirs_us for row in rows], "s--", label="block by block, fused")
        axis.set(title=direction, xlabel="blocks", xscale="log", yscale="log")
        axis.legend(frameon=False)
    axes[0].set(ylabel="microseconds")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_gains(section: Section, file: Path) -> None:
    """Times faster than eager, over length and width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        gains = {
            (_numbers(row)["L"], _numbers(row)["w"]): row.gain or 0.0
            for row in section.rows
            if row.what.startswith(direction)
        }
        lengths, widths = (sorted(set(values)) for values in zip(*gains, strict=True))
        table = [[gains.get((length, width), float("nan")) for width in widths] for length in lengths]
        image = axis.imshow(table, norm="log", cmap="viridis", aspect="auto")
        middle = math.sqrt(min(gains.values()) * max(gains.values()))
        for i, row in enumerate(table):
            for j, value in enumerate(row):
                colour = "black" if value > middle else "white"
                axis.text(j, i, f"{value:,.0f}x", ha="center", va="center", color=colour)
        axis.set(title=f"{direction}: times faster than eager", xlabel="width", ylabel="layers")
        axis.set_xticks(range(len(widths)), [str(width) for width in widths])
        axis.set_yticks(range(len(lengths)), [str(length) for length in lengths])
        figure.colorbar(image, ax=axis, format="{x:,.0f}x").ax.yaxis.set_minor_formatter("")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


PICTURES = {"growth": draw_growth, "paper": draw_gains}


def draw(name: str, section: Section, folder: Path) -> None:
    """The picture of a section, if it has one and has rows; or a note that it could not be drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    if name not in PICTURES or not section.rows:
        return
    try:
        file = folder / f"gpu_{name}.png"
        PICTURES[name](section, file)
        section.notes.append(f"![{section.title}]({file.name})")
    except ImportError:
        section.notes.append("No picture: matplotlib is not installed.")
