"""A transformed module runs the code that its model has now: methods, and the functions and constants that these name."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pcr_fx

OPTIONS = {"kernels": False, "planning": "estimated"}
HERE = sys.modules[__name__]


def helper(x: Tensor) -> Tensor:
    return x + 1


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))

    def shift(self, x: Tensor) -> Tensor:
        return x + 1

    @staticmethod
    def fixed(x: Tensor) -> Tensor:
        return x + 2

    @classmethod
    def of_class(cls, x: Tensor) -> Tensor:
        return x + 3


class Inherits(Base):
    pass


class Derived(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.shift(super().forward(x)) + Base.fixed(x) + self.of_class(x)

    def shift(self, x: Tensor) -> Tensor:
        return helper(super().shift(x))


class Explicit(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + Base.forward(self, x)


class Left(Base):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Right(Base):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Diamond(Left, Right):
    pass


class Net(nn.Module):
    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(9))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Named(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def twice(self: Any, x: Tensor) -> Tensor:
    return 2 * torch.tanh(self.layer(x))


# What is exchanged in which holder under a name, and what the blocks are.
EXCHANGES: dict[str, tuple[Any, Any, str, Any]] = {
    "forward": (Base, Base, "forward", twice),
    "an inherited forward": (Inherits, Base, "forward", twice),
    "a forward in the way of an inherited one": (Inherits, Inherits, "forward", twice),
    "a forward called by super": (Derived, Base, "forward", twice),
    "a forward called by name": (Explicit, Base, "forward", twice),
    "a forward called by super of a sibling": (Diamond, Right, "forward", twice),
    "a forward in the way of one called by super": (Diamond, Left, "shift", lambda self, x: x + 9),
    "a method called by super": (Derived, Base, "shift", lambda self, x: x - 1),
    "a static method": (Derived, Base, "fixed", staticmethod(lambda x: x - 1)),
    "a class method": (Derived, Base, "of_class", classmethod(lambda cls, x: x - 1)),
    "a function": (Derived, HERE, "helper", lambda x: x - 1),
    "a layer's forward": (Base, nn.Linear, "forward", lambda self, x: 2 * x @ self.weight.T),
    "a function that a layer calls": (Base, F, "linear", lambda x, weight, bias=None: 2 * x @ weight.T),
    "a function of PyTorch": (Base, torch, "tanh", torch.sin),
    "the model's forward": (Base, Net, "forward", lambda self, x: 2 * self.blocks[0](x)),
    "the forward of the model's base": (lambda: Named(Base), Net, "forward", lambda self, x: 2 * self.blocks[0](x)),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_code_is_exchanged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, holder, attribute, other = EXCHANGES[name]
    torch.manual_seed(0)
    made = kind()
    model = (made if isinstance(made, Net) else Net(kind)).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    fast = pcr_fx.transform(copy.deepcopy(model), x, OPTIONS)
    before = model(x)
    torch.testing.assert_close(fast(x), before)
    with monkeypatch.context() as patched:
        patched.setattr(holder, attribute, other, raising=False)
        torch.testing.assert_close(fast(x), model(x))
    torch.testing.assert_close(fast(x), before)
    graphs = list(fast._pcr_variants)
    fast(x)
    assert fast._pcr_variants == graphs
