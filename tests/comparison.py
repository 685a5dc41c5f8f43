"""Compare two modules in value and gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest expected value."""
    assert got.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float(((got.to(expected.dtype) - expected).abs().max() / scale).detach())


def value_and_gradients(model: Callable[..., Any], parameters: list[Tensor], x: Tensor) -> list[Tensor]:
    """The output of `model(x)`, then the gradients of a fixed weighting of it by `x` and all parameters."""
    x = x.detach().requires_grad_()
    output = model(x)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    gradients = torch.autograd.grad((output * weights).sum(), [x, *parameters], allow_unused=True)
    return [
        output.detach(),
        *(torch.zeros_like(p) if g is None else g for g, p in zip(gradients, [x, *parameters], strict=True)),
    ]


def assert_same(got: Callable[..., Any], expected: nn.Module, x: Tensor, tolerance: float) -> None:
    """`got` and `expected`, which share their parameters, agree forward and in every gradient."""
    parameters = list(expected.parameters())
    pairs = zip(value_and_gradients(got, parameters, x), value_and_gradients(expected, parameters, x), strict=True)
    for index, (a, b) in enumerate(pairs):
        assert relative_error(a, b) <= tolerance, f"item {index} (0 is the output, 1 the input's gradient)"
