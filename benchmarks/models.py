"""The chain that the benchmarks measure: residual blocks x + 0.1 (W2 tanh(W1 x + b1) + b2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.outer(torch.tanh(self.inner(x)))


def residual_net(length: int, width: int, seed: int = 0) -> nn.Sequential:
    """`length` blocks, `[B, width] -> [B, width]`."""
    torch.manual_seed(seed)
    return nn.Sequential(*(Block(width) for _ in range(length)))
