"""What the benchmarks measure: residual blocks x + scale (W2 tanh(W1 x + b1) + b2), alone and within a network."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, scale: float = 0.1) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.outer(torch.tanh(self.inner(x)))


def residual_block(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor]:
    """`Block` of width w as a function of its parameters, `x` being `[B, w]`."""
    return (x + 0.1 * F.linear(torch.tanh(F.linear(x, w1, b1)), w2, b2),)


def residual_net(length: int, width: int, seed: int = 0, scale: float = 0.1) -> nn.Sequential:
    """`length` blocks, `[B, width] -> [B, width]`."""
    torch.manual_seed(seed)
    return nn.Sequential(*(Block(width, scale) for _ in range(length)))


def classifier(length: int, width: int, seed: int = 0) -> nn.Sequential:
    """The network of `examples/train_resnet.py`: a stem, `length` residual blocks, a head, `[B, 64] -> [B, 10]`."""
    body = residual_net(length, width, seed, scale=5.0 / length)
    return nn.Sequential(nn.Linear(64, width), *body, nn.Linear(width, 10))


class Layer(nn.Module):
    """A plain layer, tanh(W x + b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


def plain_net(length: int, width: int) -> nn.Sequential:
    """`length` plain layers, `[B, width] -> [B, width]`."""
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(width) for _ in range(length)))


class SharedNet(nn.Module):
    """One residual block, `length` times."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.length, self.block = length, Block(width)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.length):
            x = self.block(x)
        return x


class Unrolled(nn.Module):
    """A recurrent cell over `length` steps of one input, `[B, width] -> [B, width]`."""

    def __init__(self, cell: type[nn.Module], length: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.length, self.cell = length, cell(width, width)
        self.scales = nn.Parameter(torch.linspace(0.5, 1.0, length))

    def forward(self, x: Tensor) -> Tensor:
        state: Any = torch.zeros_like(x)
        if isinstance(self.cell, nn.LSTMCell):
            state = (state, torch.zeros_like(x))
        for step in range(self.length):
            state = self.cell(self.scales[step] * x, state)
        return state[0] if isinstance(state, tuple) else state
