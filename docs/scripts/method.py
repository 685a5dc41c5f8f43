"""Pictures of the method: Newton's iteration, cyclic reduction, solvers compared, and which way in to take."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from charts import INK
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]


def contractive(z: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(z @ weight.mT * 0.35)


def residual_block(z: Tensor, weight: Tensor) -> Tensor:
    return z + 0.05 * torch.tanh(z @ weight.mT)


def chaotic(z: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(z @ weight.mT * 1.1)


KINDS: dict[str, Step] = {"contractive": contractive, "residual blocks": residual_block, "chaotic": chaotic}


def iterate(step: Step, weights: Tensor, x0: Tensor, solver: str, iterations: int) -> Tensor:
    """How far each block is from solved after each iteration, `[iterations, L]`, by plain PyTorch in float64.

    `solver` says what stands in for the Jacobians: "newton", "quasi-newton", "picard" or "jacobi".
    """
    length, d = weights.shape[:2]
    z, residuals = x0.expand(length, d).clone(), []
    for _ in range(iterations):
        before = torch.cat([x0[None], z[:-1]])
        rest = torch.vmap(step)(before, weights) - z
        residuals.append(rest.abs().amax(-1))
        jacobians = torch.vmap(torch.func.jacrev(step))(before, weights)
        instead = {
            "newton": jacobians,
            "quasi-newton": torch.diag_embed(jacobians.diagonal(dim1=-2, dim2=-1)),
            "picard": torch.eye(d, dtype=z.dtype).expand(length, d, d),
            "jacobi": torch.zeros_like(jacobians),
        }[solver]
        correction = torch.zeros_like(x0)
        for block in range(length):  # which cyclic reduction does at once
            correction = instead[block] @ correction + rest[block]
            z[block] += correction
    return torch.stack(residuals)


def _chain(length: int, d: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(length, d, d, generator=generator, dtype=torch.float64)
    return weights, torch.randn(d, generator=generator, dtype=torch.float64)


def newton() -> plt.Figure:
    """Residuals of all blocks over Newton's iterations."""
    weights, x0 = _chain(96)
    figure, plots = plt.subplots(1, 3, figsize=(10, 3), sharey=True, layout="constrained")
    for plot, (name, step) in zip(plots, KINDS.items(), strict=True):
        digits = iterate(step, weights, x0, "newton", 14).clamp(1e-16, 1e2).log10()
        image = plot.imshow(digits, aspect="auto", cmap="viridis", vmin=-16, vmax=0, extent=(0.5, 96.5, 13.5, -0.5))
        plot.set(title=name, xlabel="block")
    plots[0].set_ylabel("iteration")
    figure.colorbar(image, ax=plots, label="log10 of the residual")
    return figure


def solvers() -> plt.Figure:
    """The largest residual over iterations, by solver."""
    weights, x0 = _chain(96)
    figure, plots = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    for plot, name in zip(plots, ("residual blocks", "contractive"), strict=True):
        for solver in ("newton", "quasi-newton", "picard", "jacobi"):
            worst = iterate(KINDS[name], weights, x0, solver, 30).amax(-1)
            plot.semilogy(worst.clamp(1e-16, 1e3), ".-", markersize=4, label=solver)
        plot.set(title=name, xlabel="iteration", ylim=(1e-16, 1e3))
    plots[0].set_ylabel("largest residual")
    plots[1].legend(fontsize=8)
    return figure


def reduction() -> plt.Figure:
    """Which equations are put into which, for 16 blocks: down by halving, up again with what was found."""
    figure, plot = plt.subplots(figsize=(9, 3.8))
    left = list(range(1, 17))
    levels = [left]
    while len(left) > 1:
        left = left[1::2]
        levels.append(left)
    for level, blocks in enumerate(levels):
        plot.plot(blocks, [-level] * len(blocks), "o", color="C0", markersize=9, zorder=3)
        for position in range(1, len(blocks), 2):
            for source in blocks[position - 1 : position + 1]:
                plot.annotate("", (blocks[position], -level - 0.85), (source, -level - 0.12), arrowprops=_arrow("C0"))
    depth = len(levels) - 1
    for up, blocks in enumerate(levels[-2::-1], 1):
        known = levels[depth - up + 1]
        plot.plot(blocks, [-depth - up] * len(blocks), "o", color=INK, markersize=6, zorder=3)
        new = [block for block in blocks if block not in known]
        plot.plot(new, [-depth - up] * len(new), "o", color="C1", markersize=9, zorder=4)
        for block in new:
            below = [one for one in known if one < block]
            if below:
                ends = (block, -depth - up + 0.12), (below[-1], -depth - up + 0.85)
                plot.annotate("", *ends, arrowprops=_arrow("C1"))
    plot.set(xticks=range(1, 17), xlabel="block", yticks=[-depth / 2, -1.5 * depth])
    plot.set_yticklabels(["two affine steps\nbecome one", "states between\nare found"], fontsize=9)
    plot.spines[["left", "bottom"]].set_visible(False)
    plot.tick_params(length=0)
    return figure


def _arrow(colour: str) -> dict[str, object]:
    return {"arrowstyle": "->", "color": colour, "alpha": 0.7, "linewidth": 1}


def ways() -> plt.Figure:
    """From what one has to the way in."""
    figure, plot = plt.subplots(figsize=(10, 4.6))
    plot.set(xlim=(0.4, 10.3), ylim=(0, 4.3))
    plot.axis("off")
    questions = (
        (1.6, "Is it a loop whose\nlength varies?"),
        (4.2, "Is it a step, with its\noperands stacked?"),
        (6.8, "Train, export, or count\nmicroseconds a call?"),
    )
    answers = ("pcr_fx.scan", "pcr_fx.solve_chain", "pcr_fx.transform", 'torch.compile(model,\nbackend="deeppcr")')
    for (x, question), answer in zip(questions, answers[:3], strict=True):
        _box(plot, x, 3.6, question, INK)
        _box(plot, x, 1.2, answer, "C1")
        plot.annotate("", (x, 1.75), (x, 3.05), arrowprops=_arrow("C1"))
        plot.text(x + 0.1, 2.4, "yes", fontsize=9)
    _box(plot, 9.2, 1.2, answers[3], "C1", 1.95)
    for x in (1.6, 4.2):
        plot.annotate("", (x + 1.45, 3.6), (x + 1.12, 3.6), arrowprops=_arrow("C0"))
        plot.text(x + 1.2, 3.75, "no", fontsize=9)
    plot.annotate("", (9.2, 1.75), (7.95, 3.6), arrowprops=_arrow("C0"))
    plot.text(8.65, 2.8, "no: change nothing", fontsize=9)
    notes = (
        "one kernel for\nevery length",
        "no model,\nno graph",
        "packed parameters,\nprograms that are saved",
        "all that\nDynamo reads",
    )
    for x, note in zip((1.6, 4.2, 6.8, 9.2), notes, strict=True):
        plot.text(x, 0.35, note, ha="center", va="center", fontsize=8)
    return figure


def _box(plot: plt.Axes, x: float, y: float, text: str, colour: str, width: float = 2.2) -> None:
    shape = FancyBboxPatch(
        (x - width / 2, y - 0.5),
        width,
        1,
        "round,pad=0.02,rounding_size=0.12",
        fill=False,
        edgecolor=colour,
        linewidth=1.6,
    )
    plot.add_patch(shape)
    plot.text(x, y, text, ha="center", va="center", fontsize=9)


PICTURES: dict[str, Callable[[], plt.Figure]] = {
    "newton": newton,
    "solvers": solvers,
    "reduction": reduction,
    "ways": ways,
}
