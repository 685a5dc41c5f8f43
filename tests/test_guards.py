"""Guards of `torch.compile`: what changes in a model is seen, also by the recipe that the documentation gives."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pcr_fx

OPTIONS = {"inner_backend": "eager", "kernels": False, "planning": "estimated"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 3), 0.1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * torch.tanh(self.linear(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block() for _ in range(10)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def double(model: Any) -> None:
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.blocks[3].linear, "weight", nn.Parameter(2 * m.blocks[3].linear.weight.detach())),
        lambda m: m.blocks[3].linear.weight.requires_grad_(False),
        lambda m: setattr(m.blocks[3], "scale", 7.0),
        lambda m: setattr(m.blocks[3], "linear", nn.Linear(3, 3, bias=False)),
        lambda m: m.blocks.append(copy.deepcopy(m.blocks[5])),
        lambda m: setattr(m.blocks[3], "forward", lambda x: 2 * x),
        double,
    ],
)
@pytest.mark.parametrize("tags", [False, True])
def test_what_changes_in_a_model_is_seen(change: Callable[[Any], Any], tags: bool) -> None:
    if tags and sys.version_info >= (3, 13):
        pytest.skip("with this option Dynamo misses numbers and methods on Python 3.13, whatever the backend")
    torch._dynamo.reset()
    model, x = Net(), torch.randn(2, 3)
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=tags):
        compiled = torch.compile(model, backend="deeppcr", options=OPTIONS)
        for _ in range(3):
            compiled(x).sum().backward()
        assert pcr_fx.report().chains[0].chain.length == 10
        change(model)
        model.zero_grad()
        got = compiled(x)
        got.sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
    torch._dynamo.reset()
    expected = model(x)
    torch.testing.assert_close(got, expected)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wanted = iter(torch.autograd.grad(expected.sum(), parameters, allow_unused=True))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        own = next(wanted) if parameter.requires_grad else None
        assert (gradient is None) == (own is None)
        if own is not None:
            torch.testing.assert_close(gradient, own)
