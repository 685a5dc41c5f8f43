"""Parametrizations of what the root of a model keeps itself, before and after `transform`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import pcr_fx

OPTIONS = {"kernels": False, "planning": "estimated"}


class Twice(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(9))
        self.weight, self.bias = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x @ self.weight + self.bias


def inputs() -> Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def register(model: Any, name: str = "weight") -> None:
    parametrize.register_parametrization(model, name, Twice())


def remove(model: Any) -> None:
    parametrize.remove_parametrizations(model, "weight")


STEPS: dict[str, list[Callable[[Any], Any]]] = {
    "registered": [register],
    "registered and removed": [register, remove, register],
    "two of one": [register, register, remove],
    "two": [register, lambda m: register(m, "bias"), remove],
    "one of PyTorch's": [lambda m: parametrizations.weight_norm(m)],
}


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_the_root_is_parametrized(name: str, before: bool, pack: bool) -> None:
    torch.manual_seed(0)
    model = Net().double()
    steps = list(STEPS[name])
    twin = copy.deepcopy(model)
    if before:
        first = steps.pop(0)
        for module in (twin, model):
            torch.manual_seed(3)
            first(module)
    fast = pcr_fx.transform(twin, inputs(), OPTIONS, pack_parameters=pack)
    for step in [lambda m: None, *steps]:
        for module in (fast, model):
            torch.manual_seed(3)
            step(module)
        assert isinstance(fast, pcr_fx.TransformedModule) and isinstance(fast, Net)
        results = []
        for module in (fast, model, copy.deepcopy(fast)):
            x = inputs().requires_grad_()
            torch.manual_seed(4)
            y = module(x)
            y.sum().backward()
            results.append([y.detach(), x.grad])
        torch.testing.assert_close(results, [results[1]] * 3)
        assert fast.report.chains
