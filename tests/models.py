"""Small models that several tests share. Seeded by the caller."""

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.dropout(self.outer(torch.tanh(self.inner(x))))


class ResidualNet(nn.Module):
    """A stem, `length` residual blocks in a ModuleList, a head: `[B, 3] -> [B, 2]`."""

    def __init__(self, length: int, width: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Linear(3, width)
        self.blocks = nn.ModuleList([ResidualBlock(width, dropout) for _ in range(length)])
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def plain_mlp(length: int, width: int = 4) -> nn.Sequential:
    """`length` layers of Linear + Tanh, `[B, width] -> [B, width]`."""
    return nn.Sequential(*(layer for _ in range(length) for layer in (nn.Linear(width, width), nn.Tanh())))


class Diverging(nn.Module):
    """A chaotic chain: Newton from a repeated start does not get anywhere in 32 iterations."""

    def __init__(self, length: int, width: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(length)])
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=3.0)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = 4 * torch.sin(layer(x))
        return x
