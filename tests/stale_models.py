"""Models that are changed after `transform`, and what they are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pcr_fx

QUICK = {"kernels": False, "planning": "estimated"}


def inputs() -> Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def pair(model: nn.Module, **settings: Any) -> tuple[Any, nn.Module]:
    """A transformed module and a copy of its model, with the same changes to come."""
    model = model.double()
    fast = pcr_fx.transform(copy.deepcopy(model), inputs(), QUICK, **settings)
    fast(inputs())
    return fast, model


def assert_follows(fast: nn.Module, model: nn.Module) -> None:
    """Values, gradients of inputs and of parameters are the model's."""
    results = []
    for module in (fast, model):
        x = inputs().requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(parameter.grad for _, parameter in module.named_parameters())])
        module.zero_grad()
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


class Asking(nn.Module):
    """Runs blocks; `ask` is called first, and what it returns is a factor."""

    def __init__(self, ask: Callable[[Any, Tensor], float]) -> None:
        super().__init__()
        self.ask = ask
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(9)])

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.ask(self, x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x
