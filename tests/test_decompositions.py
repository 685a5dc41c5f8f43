"""Ops that are written out for one sample compute what they stand for, values and cotangents, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lowered_bodies import pullback_of, traced
from test_codegen_lowering import SAMPLES, assert_lowered, inputs_of
from torch import Tensor

from pcr_fx.body import written_out
from pcr_fx.codegen import Unprintable


def square(x: Tensor, size: int) -> Tensor:
    """A matrix that needs rows swapped."""
    numbers = x.reshape(-1).repeat(-(-size * size // 12))[: size * size].view(size, size)
    return numbers + torch.eye(size, dtype=x.dtype).flip(0)


def definite(x: Tensor, size: int) -> Tensor:
    return square(x, size) @ square(x, size).mT + torch.eye(size, dtype=x.dtype)


def _lu(x: Tensor) -> Tensor:
    factors, pivots = torch.linalg.lu_factor_ex(square(x, 3))[:2]
    return (
        torch.linalg.lu_solve(factors, pivots, x[:, :3])
        + torch.linalg.lu_solve(factors, pivots, x, left=True, adjoint=True)[:, :3]
    )


# Of tensors `[3, 4]`, two at the most.
USES: dict[str, Callable[..., Any]] = {
    "roll": lambda x: torch.roll(x, 1, -1) + torch.roll(x, (2, -1), (0, 1)) + torch.roll(x, 5),
    "roll by nothing": lambda x: torch.tanh(torch.roll(x, 4, 1)),
    "diag_embed": lambda x: torch.diag_embed(x, 1) * 2 + torch.diag_embed(x, -1, 0, 2).transpose(0, 1),
    "diag": lambda x: torch.diag(x[0]) @ x.mT,
    "cross": lambda x, y: torch.linalg.cross(x, y, dim=0),
    "cumsum": lambda x: x.cumsum(-1) * x.cumsum(0),
    "cumprod": lambda x: (2 + x).cumprod(1),
    "logcumsumexp by hand": lambda x: x.exp().cumsum(-1).log(),
    "logcumsumexp": lambda x: torch.logcumsumexp(x, 1) * torch.logcumsumexp(x, 0),
    "cummax": lambda x: torch.cummax(x, 1)[0] * x + torch.cummax((x * 2).round(), 0)[1],
    "cummin": lambda x: torch.cummin(x, 0)[0] * x + torch.cummin((x * 2).round(), 1)[1],
    "prod": lambda x: x.prod(1, keepdim=True) * x + (2 + x).prod(),
    "max": lambda x: x.max(1).values + x.max(0, keepdim=True)[0].sum(),
    "min": lambda x: x.min(1).values * x.min(0).indices[0],
    "max of equal ones": lambda x: (x * 2).round().max(1)[0] * x[:, 0] + x.round().max(1)[1],
    "argmax": lambda x: x * x.argmax(1, keepdim=True) + x.argmin(0) + x.argmax(),
    "sort": lambda x: x.sort(1).values * x + x.sort(0, descending=True)[0],
    "sort of equal ones": lambda x: x * (x * 2).round().sort(stable=True, dim=1).indices,
    "argsort": lambda x: x.gather(1, x.argsort(1)) * x,
    "topk": lambda x: x.topk(2, 1)[0] * x[:, :2] + x.topk(2, 1, largest=False)[0],
    "median": lambda x: x.median(1)[0] * x[:, 0] + x.median(1).values.sum() + x.median(0).values[0],
    "one_hot": lambda x: x * (x.argmax(1, keepdim=True) == torch.arange(4)),
    "take_along_dim": lambda x: torch.take_along_dim(x, x.argmin(1, keepdim=True), 1) * x,
    "an index of numbers that are computed": lambda x: x[:, x[:3].argmax(1)] * x[:, :3],
    "bilinear": lambda x, y: F.bilinear(x[:, :2], x[:, 2:], y.reshape(3, 2, 2)),
    "embedding": lambda x: F.embedding(torch.tensor([[2, 0], [1, 1]]), x),
    "pad by reflection": lambda x: F.pad(x[None], (2, 1), mode="reflect") ** 2,
    "trapezoid": lambda x: torch.trapezoid(x, dx=0.1),
    "avg_pool1d": lambda x: F.avg_pool1d(x, 2) ** 2,
    "avg_pool1d with steps, padded": lambda x: F.avg_pool1d(x[None], 3, 2, 1, count_include_pad=False) ** 2,
    "avg_pool2d": lambda x: F.avg_pool2d(x[None, None], 2, 1) ** 2,
    "avg_pool2d padded, with a divisor": lambda x: (
        F.avg_pool2d(x[None], (3, 2), (2, 1), (1, 0), divisor_override=5) ** 2
    ),
    "max_pool1d": lambda x: F.max_pool1d(x, 2, 1) ** 2,
    "max_pool2d": lambda x: F.max_pool2d(x[None, None], (2, 3), 1, (0, 1)) ** 2,
    "max_pool2d of what is left over": lambda x: F.max_pool2d(x[None], 2, (2, 3)) ** 2,
    "max_pool2d with gaps": lambda x: F.max_pool2d(x[None], (2, 2), 1, 1, (1, 2)) ** 2,
    "max_pool2d of equal ones": lambda x: F.max_pool2d((x[None, None] * 2).round() * x.mean(), 2, 1),
    "max_pool2d and where": lambda x: (lambda values, places: values * places)(
        *F.max_pool2d(x[None], 2, 1, 1, return_indices=True)
    ),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x[None], (3, 2)) ** 2 + F.adaptive_avg_pool1d(x, 1)[None],
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x[None], (1, 2)) ** 2 + F.adaptive_max_pool1d(x, 2)[None],
    "resized to the nearest": lambda x: (
        F.interpolate(x[None], scale_factor=1.7) ** 2 + F.interpolate(x[None], size=6).exp()
    ),
    "resized between": lambda x: (
        F.interpolate(x[None], size=7, mode="linear") ** 2
        + F.interpolate(x[None], size=7, mode="linear", align_corners=True).exp()
        + F.interpolate(x[None, :, :3], scale_factor=2.4, mode="linear").sin()
    ),
    "resized to less": lambda x: F.interpolate(x[None], size=3) + F.interpolate(x[None], size=3, mode="linear") ** 2,
    "conv1d": lambda x, y: F.conv1d(x[None], y.reshape(4, 3, 1), x[0]) ** 2,
    "conv1d with a step and gaps": lambda x, y: F.conv1d(
        x.reshape(1, 1, 12), y.reshape(-1)[:6].reshape(2, 1, 3), stride=2, padding=2, dilation=2
    ),
    "conv1d of groups": lambda x, y: F.conv1d(x.reshape(1, 2, 6), y.reshape(4, 1, 3), groups=2, padding=1),
    "conv1d of a size that is left over": lambda x, y: F.conv1d(
        x.reshape(1, 1, 12), y[:1, :3].reshape(1, 1, 3), stride=4
    ),
    "conv2d": lambda x, y: F.conv2d(x.reshape(1, 1, 3, 4), y.reshape(-1)[:8].reshape(2, 1, 2, 2), padding=(1, 0)),
    "triangular solve": lambda x: (
        torch.linalg.solve_triangular(definite(x, 3), x, upper=True)
        + torch.linalg.solve_triangular(definite(x, 4), x, upper=False, left=False, unitriangular=True)
    ),
    "lu": _lu,
    "solve": lambda x: torch.linalg.solve_ex(square(x, 3), x)[0],
    "solve a transpose": lambda x: torch.linalg.solve_ex(square(x, 3).mT, x)[0],
    "solve from the right": lambda x: torch.linalg.solve_ex(square(x, 4), x, left=False)[0],
    "solve for a vector": lambda x: torch.linalg.solve_ex(square(x, 3), x[:, 0])[0],
    "solve eight": lambda x: torch.linalg.solve_ex(definite(x, 8), torch.ones(8, 1, dtype=x.dtype))[0],
    "inverse of one": lambda x: torch.linalg.inv_ex(square(x, 1))[0],
    "inverse of two": lambda x: torch.linalg.inv_ex(square(x, 2))[0],
    "inverse of three": lambda x: torch.linalg.inv_ex(square(x, 3))[0],
    "inverse of some": lambda x: torch.linalg.inv_ex(torch.stack([square(x, 2), square(x.flip(1), 2).mT]))[0],
    "logdet": lambda x: torch.logdet(definite(x, 3)),
    "slogdet": lambda x: torch.linalg.slogdet(square(x, 3))[1],
    "slogdet of a transpose": lambda x: torch.linalg.slogdet(square(x, 4).mT)[1],
    "cholesky": lambda x: torch.linalg.cholesky_ex(definite(x, 3))[0],
    "cholesky, upper": lambda x: torch.linalg.cholesky_ex(definite(x, 3), upper=True)[0],
    "cholesky_solve": lambda x: torch.cholesky_solve(x, torch.linalg.cholesky_ex(definite(x, 3))[0]),
}


@pytest.mark.parametrize("name", USES)
def test_an_op_written_out(name: str) -> None:
    function = USES[name]
    inputs = inputs_of(function)
    assert_lowered(traced(function, [tensor[0] for tensor in inputs], decomposed=True), function, inputs)
    first = function(*(tensor[0] for tensor in inputs))
    cotangent = inputs[0].new_tensor(range(1, SAMPLES * first.numel() + 1)).reshape(SAMPLES, *first.shape)
    pullback, given = pullback_of(function), [*inputs, cotangent]
    assert_lowered(traced(pullback, [tensor[0] for tensor in given], decomposed=True), pullback, given)


@pytest.mark.parametrize(
    "function",
    [lambda x: x.cumsum(1), lambda x: x.sort(1)[0], lambda x: torch.linalg.inv_ex(x @ x.mT)[0]],
    ids=["cumsum", "sort", "inverse"],
)
def test_what_is_too_large_to_be_written_out_is_named(function: Callable[..., Any]) -> None:
    x = torch.randn(65, 65, dtype=torch.float64)
    graph = traced(function, [x], decomposed=True)
    with pytest.raises(Unprintable, match=r"aten\.(cumsum|sort|linalg_inv_ex)"):
        assert_lowered(graph, function, [torch.stack([x, x])])


@pytest.mark.parametrize("number", [-torch.inf, torch.nan, 1.0])
@pytest.mark.parametrize("padding", [0, 1])
def test_where_maxima_of_equal_numbers_stand(number: float, padding: int) -> None:
    """The gradient goes to the first, but of NaN to the last; padding is none of them."""
    x = torch.full((1, 4, 4), number, dtype=torch.float64)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.vjp(lambda x: F.max_pool2d(x, 3, 2, padding), x)[1](
            torch.ones(1, 1 + padding, 1 + padding, dtype=x.dtype)
        )[0]

    assert torch.equal(traced(gradient, [x], decomposed=True)(x), gradient(x))


@pytest.mark.parametrize("channels", [1, 3])
def test_prelu(channels: int) -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64).requires_grad_()
    weight = torch.randn(channels, dtype=torch.float64).requires_grad_()
    x.data[0, 0, 0] = 0.0
    ours, theirs = written_out.prelu(x, weight), F.prelu(x, weight)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    cotangent = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, (x, weight), cotangent),
        torch.autograd.grad(theirs, (x, weight), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_determinant(size: int) -> None:
    matrix = torch.randn(5, size, size, dtype=torch.float64).requires_grad_()
    ours, theirs = written_out.det(matrix), torch.linalg.det(matrix)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (mine,), (other,) = (torch.autograd.grad(value.sum(), matrix) for value in (ours, theirs))
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
