"""Solvers of differential equations, and physics stepped by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.public.exhibit import STEPS, Calling, Made, exhibit, perceptron

# --- torchdiffeq, torchsde, torchcde, torchode -------------------------------------------------------------------------


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y) * torch.cos(t)


def _odeint(method: str, every: bool) -> Made:
    from torchdiffeq import odeint

    def run(self: Any, y: Tensor) -> Tensor:
        states = odeint(self.field, y, torch.linspace(0, 1, STEPS + 1), method=method)
        return states if every else states[-1]

    return Calling(run, field=Field()), (torch.randn(8, 4),)


for _method in ("euler", "midpoint", "rk4"):
    exhibit(f"torchdiffeq {_method}", STEPS, "torchdiffeq")(partial(_odeint, _method, False))
exhibit("torchdiffeq rk4, all states", STEPS, "torchdiffeq")(partial(_odeint, "rk4", True))


@exhibit("torchdiffeq rk4 by step_size", STEPS, "torchdiffeq")
def by_step_size() -> Made:
    from torchdiffeq import odeint

    def run(self: Any, y: Tensor) -> Tensor:
        ends = torch.tensor([0.0, 1.0])
        return odeint(self.field, y, ends, method="rk4", options={"step_size": 1 / STEPS})[-1]

    return Calling(run, field=Field()), (torch.randn(8, 4),)


class Diffusion(nn.Module):
    noise_type, sde_type = "diagonal", "ito"

    def __init__(self) -> None:
        super().__init__()
        self.drift, self.noise = perceptron(), perceptron()

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.drift(y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid(self.noise(y))


@exhibit("torchsde euler", STEPS, "torchsde")
def sdeint() -> Made:
    import torchsde

    def run(self: Any, y: Tensor) -> Tensor:
        noise = torchsde.BrownianInterval(t0=0.0, t1=1.0, size=(8, 4), entropy=3)
        times = torch.linspace(0, 1, STEPS + 1)
        return torchsde.sdeint(self.sde, y, times, method="euler", dt=1 / STEPS, bm=noise)

    return Calling(run, sde=Diffusion()), (torch.randn(8, 4),)


class Controlled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 24)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.linear(z)).view(*z.shape, 3)


def _cdeint(method: str) -> Made:
    import torchcde

    def run(self: Any, coefficients: Tensor) -> Tensor:
        path = torchcde.CubicSpline(coefficients)
        start = self.start(path.evaluate(path.interval[0]))
        options = {"step_size": 1.0}
        return torchcde.cdeint(path, self.field, start, path.interval, adjoint=False, method=method, options=options)

    coefficients = torchcde.natural_cubic_coeffs(torch.randn(4, STEPS + 1, 3))
    return Calling(run, field=Controlled(), start=nn.Linear(3, 8)), (coefficients,)


for _method in ("euler", "rk4"):
    exhibit(f"torchcde {_method}", STEPS - 2, "torchcde")(partial(_cdeint, _method))


@exhibit("torchode, fixed steps", STEPS, "torchode")
def torchode_euler() -> Made:
    import torchode

    def run(self: Any, y: Tensor) -> Tensor:
        step = torchode.Euler(term=torchode.ODETerm(lambda _, y: self.net(y)))
        solver = torchode.AutoDiffAdjoint(step, torchode.FixedStepController())
        times = torch.linspace(0, 1, STEPS + 1).repeat(8, 1)
        problem = torchode.InitialValueProblem(y0=y, t_eval=times)
        return solver.solve(problem, dt0=torch.full((8,), 1 / STEPS)).ys

    return Calling(run, net=perceptron()), (torch.randn(8, 4),)


# --- by hand ----------------------------------------------------------------------------------------------------------


@exhibit("pendulum, RK4", STEPS)
def pendulum() -> Made:
    def run(self: Any, y: Tensor, pushes: Tensor) -> Tensor:
        def slope(y: Tensor, push: Tensor) -> Tensor:
            angle, speed = y[..., 0], y[..., 1]
            return torch.stack([speed, -self.gravity * torch.sin(angle) - self.friction * speed + push], -1)

        dt, states = 0.05, []
        for push in pushes:
            a = slope(y, push)
            b = slope(y + dt / 2 * a, push)
            c = slope(y + dt / 2 * b, push)
            d = slope(y + dt * c, push)
            y = y + dt / 6 * (a + 2 * b + 2 * c + d)
            states.append(y)
        return torch.stack(states)

    numbers = {"gravity": nn.Parameter(torch.tensor(9.8)), "friction": nn.Parameter(torch.tensor(0.1))}
    return Calling(run, **numbers), (torch.randn(8, 2), torch.randn(STEPS, 8))


@exhibit("rain and runoff, after HBV")
def buckets() -> Made:
    def run(self: Any, rain: Tensor, warmth: Tensor, demand: Tensor) -> Tensor:
        share = torch.sigmoid(self.shares)
        snow = soil = upper = lower = torch.zeros(8)
        flow = torch.zeros(STEPS, 8)
        for day in range(STEPS):
            falls = torch.where(warmth[day] <= 0, rain[day], 0.0)
            melt = torch.minimum(share[0] * 5 * warmth[day].clamp(min=0), snow)
            snow = snow + falls - melt
            water = rain[day] - falls + melt
            recharge = water * (soil / 100).clamp(1e-5, 1) ** (1 + share[1] * 5)
            soil = (soil + water - recharge - torch.minimum(demand[day] * soil / 100, soil)).clamp(min=0)
            sinks = torch.minimum(upper + recharge, share[2] * 3)
            upper = upper + recharge - sinks
            fast, slow = share[3] * 0.5 * upper, share[4] * 0.1 * (lower + sinks)
            upper, lower = upper - fast, lower + sinks - slow
            flow[day] = fast + slow
        return flow

    given = torch.rand(STEPS, 8) * 10, torch.randn(STEPS, 8) * 5, torch.rand(STEPS, 8)
    return Calling(run, shares=nn.Parameter(torch.randn(5, 8))), given


@exhibit("Kalman filter with its likelihood")
def kalman() -> Made:
    def run(self: Any, seen: Tensor) -> Tensor:
        mean, spread, total = torch.zeros(4, 4), torch.eye(4).expand(4, 4, 4), torch.zeros(4)
        moves, sees = self.moves, self.sees
        noise, blur = torch.eye(4) * self.noise.exp(), torch.eye(2) * self.blur.exp()
        for now in seen:
            mean, spread = mean @ moves.T, moves @ spread @ moves.T + noise
            innovation = sees @ spread @ sees.T + blur
            gain = spread @ sees.T @ torch.linalg.inv(innovation)
            error = (now - mean @ sees.T)[..., None]
            mean, spread = mean + (gain @ error)[..., 0], spread - gain @ sees @ spread
            distance = (error.mT @ torch.linalg.solve(innovation, error))[..., 0, 0]
            total = total - 0.5 * (torch.logdet(innovation) + distance)
        return total

    parts = {
        "moves": nn.Parameter(0.9 * torch.eye(4) + 0.02 * torch.randn(4, 4)),
        "sees": nn.Parameter(torch.randn(2, 4)),
        "noise": nn.Parameter(torch.zeros(())),
        "blur": nn.Parameter(torch.zeros(())),
    }
    return Calling(run, **parts), (torch.randn(STEPS, 4, 2),)


@exhibit("heat, by roll", STEPS)
def heat() -> Made:
    def run(self: Any, u: Tensor) -> Tensor:
        for _ in range(STEPS):
            u = u + self.rate * (u.roll(1, -1) - 2 * u + u.roll(-1, -1))
        return u

    return Calling(run, rate=nn.Parameter(torch.tensor(0.2))), (torch.randn(8, 16),)


@exhibit("waves, by conv1d", STEPS)
def waves() -> Made:
    def run(self: Any, u: Tensor, v: Tensor) -> Tensor:
        for _ in range(STEPS):
            v = v + self.rate * F.conv1d(F.pad(u, (1, 1), mode="circular"), self.kernel)
            u = u + 0.1 * v
        return u

    model = Calling(run, rate=nn.Parameter(torch.tensor(0.1)))
    model.register_buffer("kernel", torch.tensor([[[1.0, -2.0, 1.0]]]))
    return model, (torch.randn(8, 1, 16), torch.zeros(8, 1, 16))
