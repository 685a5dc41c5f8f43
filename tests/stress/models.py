"""Chains to be run under stress, and what is right of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LIMIT = 1e-4  # of errors, where values are near 1


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.tanh(self.inner(x))


def network(length: int, width: int) -> nn.Sequential:
    torch.manual_seed(1000 * length + width)
    return nn.Sequential(*(Block(width) for _ in range(length)))


def samples(width: int) -> Tensor:
    return torch.randn(5, width, generator=torch.Generator().manual_seed(width))


def wrong(fast: Any, model: nn.Module, x: Tensor) -> str:
    """What is wrong with the values and gradients of `fast`; nothing if all is right."""
    results = []
    for call in (fast, model):
        given = x.clone().requires_grad_()
        y = call(given)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), (given, *model.parameters()))))
    names = ("the result", "the gradient of the input", *(name for name, _ in model.named_parameters()))
    for name, ours, theirs in zip(names, *results, strict=True):
        error = (ours - theirs).abs().max().item()
        if not error <= LIMIT * max(1.0, theirs.abs().max().item()):
            return f"{name} is off by {error:.2e}"
    return ""
