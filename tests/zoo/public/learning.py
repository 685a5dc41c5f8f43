"""Depth: flows, equilibria, graph networks; and gradient steps within a model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from zoo.public.exhibit import LAYERS, STEPS, Calling, Made, exhibit


def _points() -> tuple[Tensor, ...]:
    return (torch.randn(8, 4),)


@exhibit("zuko.RealNVP", LAYERS // 2 - 1, "zuko")
def zuko_coupling() -> Made:
    import zuko

    flow = zuko.flows.RealNVP(4, transforms=LAYERS, hidden_features=(8,))
    return Calling(lambda self, x: self.flow().log_prob(x), flow=flow), _points()


@exhibit("zuko.MAF", LAYERS // 2 - 1, "zuko")
def zuko_autoregressive() -> Made:
    import zuko

    flow = zuko.flows.MAF(4, transforms=LAYERS, hidden_features=(8,))
    return Calling(lambda self, x: self.flow().log_prob(x), flow=flow), _points()


def _density(self: Any, x: Tensor) -> Tensor:
    z, volume = self.flow(x)
    return z.sum(-1) + volume


@exhibit("nflows.AffineCouplingTransform", LAYERS // 2, "nflows")
def nflows_coupling() -> Made:
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import AffineCouplingTransform, CompositeTransform

    def net(features: int, results: int) -> nn.Module:
        return ResidualNet(features, results, hidden_features=8, num_blocks=1)

    masks = [[0, 1, 0, 1], [1, 0, 1, 0]] * (LAYERS // 2)
    return Calling(_density, flow=CompositeTransform([AffineCouplingTransform(mask, net) for mask in masks])), _points()


@exhibit("normflows.Planar", LAYERS, "normflows")
def planar() -> Made:
    import normflows

    flow = normflows.flows.base.Composite([normflows.flows.Planar((4,)) for _ in range(LAYERS)])
    return Calling(_density, flow=flow), _points()


@exhibit("FrEIA.AllInOneBlock", LAYERS - 1, "FrEIA")
def glow() -> Made:
    import FrEIA.framework
    import FrEIA.modules

    def net(features: int, results: int) -> nn.Module:
        return nn.Sequential(nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, results))

    flow = FrEIA.framework.SequenceINN(4)
    for _ in range(LAYERS):
        flow.append(FrEIA.modules.AllInOneBlock, subnet_constructor=net)
    return Calling(_density, flow=flow), _points()


@exhibit("torchdeq, thirty iterations", LAYERS, "torchdeq")
def torchdeq_iteration() -> Made:
    from torchdeq import get_deq

    def run(self: Any, x: Tensor) -> Tensor:
        return self.deq(lambda z: torch.tanh(self.linear(z) + x), torch.zeros_like(x))[0][-1]

    deq = get_deq(f_solver="fixed_point_iter", f_max_iter=30, f_tol=0.0, ift=False, grad=1)
    return Calling(run, linear=nn.Linear(4, 4), deq=deq), _points()


@exhibit("equilibrium, gradients of the last step", STEPS)
def equilibrium() -> Made:
    def run(self: Any, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(STEPS):
                z = torch.tanh(self.linear(z) + x)
        return torch.tanh(self.linear(z) + x)

    return Calling(run, linear=nn.Linear(4, 4)), _points()


@exhibit("GCNII", STEPS)
def gcnii() -> Made:
    def run(self: Any, x: Tensor, graph: Tensor) -> Tensor:
        first = x
        for index, layer in enumerate(self.layers):
            beta = math.log(0.5 / (index + 1) + 1)
            mixed = 0.9 * (graph @ x) + 0.1 * first
            x = torch.relu((1 - beta) * mixed + beta * layer(mixed))
        return x

    layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(STEPS))
    return Calling(run, layers=layers), (torch.randn(10, 8), torch.rand(10, 10) / 5)


@exhibit("MAML, torch.func.grad", LAYERS)
def inner_steps() -> Made:
    def run(self: Any, x: Tensor, y: Tensor) -> Tensor:
        weight = self.weight
        for _ in range(LAYERS):
            weight = weight - 0.1 * torch.func.grad(lambda w: (x @ w - y).square().mean())(weight)
        return (x @ weight - y).square().mean()

    return Calling(run, weight=nn.Parameter(torch.randn(4, 1))), (torch.randn(16, 4), torch.randn(16, 1))
