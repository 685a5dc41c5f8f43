"""An exhibit of the second zoo."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Steps of loops over time, and layers of what is deep.
STEPS, LAYERS = 64, 24

Made = tuple[nn.Module, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Exhibit:
    """A model with its inputs.

    Attributes:
        least: how long the longest chain in it has to be.
        package: the library that it comes from; empty for none.
    """

    name: str
    make: Callable[[], Made]
    least: int
    package: str = ""

    @property
    def is_here(self) -> bool:
        """Whether its library is installed."""
        return not self.package or importlib.util.find_spec(self.package) is not None

    def build(self) -> Made:
        torch.manual_seed(0)
        model, inputs = self.make()
        return model.eval(), tuple(one.requires_grad_() if one.is_floating_point() else one for one in inputs)


EXHIBITS: list[Exhibit] = []


def exhibit(name: str, least: int = STEPS - 1, package: str = "") -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    """Enter what makes a model in the zoo; the first step of a loop may differ from the others."""

    def enter(make: Callable[[], Made]) -> Callable[[], Made]:
        EXHIBITS.append(Exhibit(name, make, least, package))
        return make

    return enter


class Calling(nn.Module):
    """A function of its parts and what it is given."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def perceptron(inner: int = 16, outer: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(outer, inner), nn.Tanh(), nn.Linear(inner, outer))
