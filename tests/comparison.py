"""Compare two modules in value and gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pcr_fx


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest expected value."""
    assert got.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float(((got.to(expected.dtype) - expected).abs().max() / scale).detach())


def value_and_gradients(model: Callable[..., Any], parameters: list[Tensor], *inputs: Tensor) -> list[Tensor]:
    """The output of `model(*inputs)`, then the gradients of a fixed weighting of it by the inputs and all parameters."""
    inputs = tuple(one.detach().requires_grad_(one.is_floating_point() or one.is_complex()) for one in inputs)
    leaves = [*(one for one in inputs if one.requires_grad), *parameters]
    output = model(*inputs)
    if not output.requires_grad:
        return [output]
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    gradients = torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True)
    return [
        output.detach(),
        *(torch.zeros_like(leaf) if one is None else one for one, leaf in zip(gradients, leaves, strict=True)),
    ]


def rewritten(model: nn.Module, x: Tensor, way: str, options: dict[str, Any]) -> nn.Module:
    """The model by one of the two ways in, "transform" or "compile"."""
    if way == "transform":
        return pcr_fx.transform(model, x, options=options)
    torch._dynamo.reset()
    return torch.compile(model, backend="deeppcr", options={**options, "inner_backend": "eager"})  # type: ignore[return-value]


def chains_of(fast: nn.Module) -> list[dict[str, Any]]:
    """The chains that a report tells of after a call of what `rewritten` returned."""
    is_compiled = isinstance(fast, torch._dynamo.OptimizedModule)
    return (pcr_fx.report() if is_compiled else pcr_fx.report(fast)).to_dict()["chains"]  # type: ignore[no-any-return]


def assert_same(got: Callable[..., Any], expected: nn.Module, x: Tensor, tolerance: float) -> None:
    """`got` and `expected`, which share their parameters, agree forward and in every gradient."""
    parameters = list(expected.parameters())
    pairs = zip(value_and_gradients(got, parameters, x), value_and_gradients(expected, parameters, x), strict=True)
    for index, (a, b) in enumerate(pairs):
        assert relative_error(a, b) <= tolerance, f"item {index} (0 is the output, 1 the input's gradient)"
