"""Pictures of what the code of pages computed; each function is given all that its page defines."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import torch
from charts import INK


def start(page: dict[str, Any]) -> plt.Figure:
    figure, (losses, seconds) = plt.subplots(1, 2, figsize=(9, 2.8))
    for name, colour, width in (("plain", "C0", 5), ("fast", "C1", 1.8)):
        label = {"plain": "as it is", "fast": "with pcr_fx"}[name]
        losses.plot(page[f"{name}_losses"], color=colour, linewidth=width, alpha=0.5 if width > 2 else 1, label=label)
        seconds.plot([1e3 * one for one in page[f"{name}_seconds"]], ".-", color=colour, label=label)
    losses.set(xlabel="training step", ylabel="loss", title="The same losses")
    seconds.set(xlabel="training step", ylabel="ms", yscale="log", title="Time of each step")
    losses.legend()
    return figure


def recurrent(page: dict[str, Any]) -> plt.Figure:
    figure, (losses, one) = plt.subplots(1, 2, figsize=(9, 2.8))
    losses.plot(page["losses"])
    losses.set(xlabel="training step", ylabel="loss", yscale="log")
    torch.manual_seed(1)
    xs = torch.rand(100, 32, 1)
    one.plot(xs[:, 0, 0], ".", color=INK, markersize=3, label="seen")
    one.plot(xs[:, 0, 0].cumsum(0) / torch.arange(1.0, 101), color="C0", linewidth=4, alpha=0.4, label="running mean")
    one.plot(page["model"](xs)[:, 0, 0].detach(), color="C1", label="as the network says it")
    one.set(xlabel="step", ylim=(0, 1.5))
    one.legend(fontsize=8, loc="upper right")
    return figure


def odes(page: dict[str, Any]) -> plt.Figure:
    figure, plots = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True, sharey=True)
    for plot, states, title in zip(plots, (page["before"], page["after"]), ("untrained", "trained"), strict=True):
        for one in range(states.shape[1]):
            plot.plot(*page["truth"][:, one].T, color=INK, linewidth=4, alpha=0.4, label="truth" if not one else None)
            plot.plot(*states[:, one].T, color="C1", label="neural ODE" if not one else None)
            plot.plot(*page["start"][one], "o", color="C0")
        plot.set(title=title, aspect="equal")
    plots[1].legend(fontsize=8)
    return figure


def spiking(page: dict[str, Any]) -> plt.Figure:
    figure, plots = plt.subplot_mosaic([["given", "potential"], ["said", "right"]], figsize=(9, 4.2))
    potential, spikes, _ = (one.detach() for one in page["model"](page["xs"]))
    for name, times, title in (("given", page["xs"], "spikes given"), ("said", spikes, "spikes of the neurons")):
        at = [times[:, 0, one].nonzero()[:, 0].tolist() for one in range(times.shape[2])]
        plots[name].eventplot(at, linewidths=1, color="C0")
        plots[name].set(title=title, yticks=[], xlabel="step")
    busiest = int(spikes[:, 0].sum(0).argmax())
    plots["potential"].plot(potential[:, 0, busiest], color="C1")
    plots["potential"].axhline(1, color=INK, linewidth=0.8, linestyle="--")
    plots["potential"].set(title="a membrane potential, and its threshold", xlabel="step")
    plots["right"].plot([100 * one for one in page["right"]], color="C2")
    plots["right"].set(title="% right, over training", xlabel="training step")
    figure.tight_layout()
    return figure


def filters(page: dict[str, Any]) -> plt.Figure:
    figure, (path, fit) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(3, 2))
    path.plot(*page["seen"][:, 0].T, ".", color=INK, markersize=4, label="seen")
    path.plot(*page["path"][:, 0].T, color="C0", linewidth=4, alpha=0.4, label="true")
    path.plot(*page["means"][:, 0, :2].detach().T, color="C1", label="filtered")
    path.legend(fontsize=8)
    fit.plot(page["fits"], color="C2")
    fit.set(xlabel="training step", title="log likelihood of a step")
    return figure


def simulators(page: dict[str, Any]) -> plt.Figure:
    figure, (height, push) = plt.subplots(2, 1, figsize=(8, 3.8), sharex=True)
    times = page["dt"] * torch.arange(1, 101)
    heights, best = -torch.cos(page["ys"][..., 0].detach()), int(page["best"])
    for one in range(heights.shape[1]):
        height.plot(times, heights[:, one], color=INK, alpha=0.4, linewidth=1)
    height.plot(times, heights[:, best], color="C1", linewidth=2.5)
    height.set(ylabel="height", title="eight attempts; the best one in colour")
    push.step(times, page["pushes"][:, best].detach(), color="C0")
    push.set(xlabel="seconds", ylabel="push")
    figure.tight_layout()
    return figure


def diffusion(page: dict[str, Any]) -> plt.Figure:
    figure, plot = plt.subplots(figsize=(9, 4))
    torch.manual_seed(0)
    x, paths = page["x"], [page["x"]]
    for t in range(page["steps"]):
        clean = page["sampler"].denoise(x, page["signal"][t], page["noise"][t])
        x = page["signal"][t + 1] * clean + page["noise"][t + 1] * (x - page["signal"][t] * clean) / page["noise"][t]
        paths.append(x)
    heights = torch.stack(paths)[..., 1]
    for one in range(60):
        plot.plot(heights[:, one], color="C0", alpha=0.25, linewidth=0.8)
    for drift, (points, colour) in enumerate(((page["x"], INK), (page["drawn"], "C1"))):
        at = (-14, page["steps"] + 14)[drift]
        plot.plot(at + 5 * points[:, 0], points[:, 1], ".", color=colour, markersize=4)
    plot.set(xlabel="denoising step", yticks=[], ylim=(-2.6, 2.6), xticks=range(0, page["steps"] + 1, 8))
    return figure


def deep(page: dict[str, Any]) -> plt.Figure:
    figure, (losses, apart) = plt.subplots(1, 2, figsize=(9, 2.8))
    losses.plot(page["plain_losses"], linewidth=5, alpha=0.5, label="as it is")
    losses.plot(page["fast_losses"], linewidth=1.8, label="packed")
    losses.set(xlabel="training step", ylabel="loss")
    losses.legend()
    difference = [abs(a - b) for a, b in zip(page["plain_losses"], page["fast_losses"], strict=True)]
    apart.plot(difference, ".-", color="C2")
    apart.set(xlabel="training step", title="difference of the losses")
    figure.tight_layout()
    return figure
