"""Samplers of diffusion models, and of distributions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.public.exhibit import Calling, Made, exhibit

_SIGMAS = 50


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time, self.inner, self.outer = nn.Embedding(1000, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.outer(F.silu(self.inner(x) + self.time(t)))


def _scheduler(name: str, counts: bool) -> Made:
    """
    Args:
        counts: whether it counts its steps, and has to be set back before each call.
    """
    import diffusers

    def run(self: Any, x: Tensor) -> Tensor:
        if counts:
            self.scheduler.set_timesteps(_SIGMAS)
        for t in self.scheduler.timesteps:
            scaled = self.scheduler.scale_model_input(x, t)
            x = self.scheduler.step(self.denoiser(scaled, t.long()), t, x).prev_sample
        return x

    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(_SIGMAS)
    return Calling(run, denoiser=Denoiser(), scheduler=scheduler), (torch.randn(4, 8),)


for _name, _counts in {"DDIM": False, "DDPM": False, "EulerDiscrete": True, "DPMSolverMultistep": True}.items():
    _title = f"{_name}Scheduler"
    exhibit(f"diffusers.{_title}", _SIGMAS - 5, "diffusers")(partial(_scheduler, _title, _counts))


def _sampler(run: Any) -> Made:
    model = Calling(run, denoiser=Denoiser())
    model.register_buffer("sigmas", torch.linspace(3, 0.05, _SIGMAS + 1))
    model.register_buffer("times", torch.arange(_SIGMAS + 1))
    return model, (torch.randn(4, 8),)


@exhibit("Karras et al., Heun", _SIGMAS - 2)
def heun() -> Made:
    def run(self: Any, x: Tensor) -> Tensor:
        sigmas, times = self.sigmas, self.times
        for i in range(_SIGMAS):
            slope = (x - self.denoiser(x, times[i])) / sigmas[i]
            ahead = x + slope * (sigmas[i + 1] - sigmas[i])
            other = (ahead - self.denoiser(ahead, times[i + 1])) / sigmas[i + 1]
            x = x + (slope + other) / 2 * (sigmas[i + 1] - sigmas[i])
        return x

    return _sampler(run)


@exhibit("Euler, ancestral", _SIGMAS - 2)
def ancestral() -> Made:
    def run(self: Any, x: Tensor) -> Tensor:
        sigmas = self.sigmas
        for i in range(_SIGMAS):
            clean = x + self.denoiser(x / (sigmas[i] ** 2 + 1) ** 0.5, self.times[i]) * sigmas[i]
            up = (sigmas[i + 1] ** 2 * (sigmas[i] ** 2 - sigmas[i + 1] ** 2) / sigmas[i] ** 2) ** 0.5
            down = (sigmas[i + 1] ** 2 - up**2) ** 0.5
            x = x + (x - clean) / sigmas[i] * (down - sigmas[i]) + torch.randn_like(x) * up
        return x

    return _sampler(run)


def _energy() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


@exhibit("Langevin, torch.func.grad", _SIGMAS)
def langevin() -> Made:
    def run(self: Any, x: Tensor) -> Tensor:
        slope = torch.func.grad(lambda y: self.energy(y).sum())
        for _ in range(_SIGMAS):
            x = x - 0.01 * slope(x) + 0.1 * torch.randn_like(x)
        return x

    return Calling(run, energy=_energy()), (torch.randn(8, 4),)


@exhibit("Hamiltonian Monte Carlo, leapfrog", _SIGMAS - 1)
def leapfrog() -> Made:
    def run(self: Any, q: Tensor, p: Tensor) -> Tensor:
        slope = torch.func.grad(lambda y: self.energy(y).sum())
        for _ in range(_SIGMAS):
            p = p - 0.05 * slope(q)
            q = q + 0.1 * p
            p = p - 0.05 * slope(q)
        return q

    return Calling(run, energy=_energy()), (torch.randn(8, 4), torch.randn(8, 4))
