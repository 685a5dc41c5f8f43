"""Chains that several tests of the GPU's kernels share, and how they are checked against the model in float64."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import relative_error
from torch import Tensor, nn

import pcr_fx
from pcr_fx.registry import Registry

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEWTON = {"solver": "newton", "min_length": 2, "on_failure": "raise"}


def coupled(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x + 0.3 * torch.tanh(F.linear(x, w, b))


def gated(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w)) * x + F.softplus(b)


def normed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x + 0.3 * F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], b, b), w))


def piecewise(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x - 0.2 * F.relu(F.linear(x, w, b)).clamp(max=1.0) + torch.where(x > 0, 0.1 * x, torch.expm1(0.1 * x))


def attention(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Two tokens of half the features."""
    tokens = x.unflatten(-1, (2, -1))
    weights = torch.softmax(tokens @ tokens.transpose(-1, -2), -1)
    return x + 0.1 * (weights @ tokens).flatten(-2) * b


BODIES = {body.__name__: body for body in (coupled, gated, normed, piecewise, attention)}


def in_turn(names: Iterable[str], sizes: Sequence[tuple[int, ...]]) -> list[tuple[Any, ...]]:
    """Each body with one of the sizes, in turn, and the first with all of them: the interpreter takes seconds for each."""
    first, *others = names
    return [*((first, *size) for size in sizes), *((name, *sizes[n % len(sizes)]) for n, name in enumerate(others))]


class Block(nn.Module):
    def __init__(self, body: Callable[..., Tensor], width: int) -> None:
        super().__init__()
        self.body = body
        self.weight = nn.Parameter(torch.randn(width, width) / math.sqrt(width))
        self.bias = nn.Parameter(0.5 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, self.weight, self.bias)


def net(body: Callable[..., Tensor], width: int, length: int) -> nn.Sequential:
    torch.manual_seed(width * length)
    return nn.Sequential(*(Block(body, width) for _ in range(length))).to(DEVICE)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers wherever the tests run: a GPU would draw others."""
    return torch.randn(*shape, dtype=dtype).to(DEVICE)


def chain_of(model: Any) -> dict[str, Any]:
    (chain,) = model.report.to_dict()["chains"]
    return chain


def value_and_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = model(x)
    cotangent = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device).reshape(out.shape)
    inputs = [x, *model.parameters()]
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent, materialize_grads=True)]


def check(model: nn.Module, x: Tensor, options: Any, tolerance: float) -> Any:
    """The transformed model against the model itself in float64."""
    transformed = pcr_fx.transform(model, (x,), options=options)
    got = value_and_gradients(transformed, x)
    dtype = x.dtype
    expected = value_and_gradients(model.double(), x.double())
    model.to(dtype)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.shape == theirs.shape
        error = relative_error(ours.double(), theirs)
        assert error < tolerance, f"{error} is not below {tolerance}"
    return transformed


def check_stats(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Iterations and residual of kernels against those of the solver in PyTorch's ops, in float64."""
    from pcr_fx.planner import plan

    ours = pcr_fx.transform(model, (x,), options=NEWTON)
    ours(x)
    monkeypatch.setattr(plan, "_plans", Registry())
    theirs = pcr_fx.transform(model, (x,), options={**NEWTON, "kernels": False})
    theirs(x)
    ours, theirs = chain_of(ours), chain_of(theirs)
    assert abs(ours["iterations"] - theirs["iterations"]) <= 1
    assert 0 < ours["residual"] < 1e-15 and theirs["residual"] < 1e-15


class Recurrence(nn.Module):
    """A cell unrolled over time: shared weights, and an input for each step and sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, width)

    def forward(self, inputs: Tensor) -> Tensor:
        state = inputs.new_zeros(inputs.shape[1], self.cell.hidden_size)
        for step in inputs.unbind(0):
            state = self.cell(step, state)
        return state


def logistic(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Chaotic where `x` starts between 0 and 1, at rest where it starts at 0."""
    return 3.9 * x * (1 - x) + 0 * b
