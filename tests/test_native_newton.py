"""Newton's method in native code, against blocks in float64."""

import math
from typing import Any

import pytest
import torch
from comparison import relative_error, value_and_gradients
from kernel_cases import Deep, Recurrence, by_kernel, states
from models import Diverging, plain_mlp
from torch import Tensor, nn

import pcr_fx

pytestmark = pytest.mark.usefixtures("kernel_cache")


def assert_solved(fast: Any, model: nn.Module, x: Tensor, limit: float) -> None:
    ours = value_and_gradients(fast, list(model.parameters()), x)
    for got, true in zip(ours, value_and_gradients(model, list(model.parameters()), x), strict=True):
        assert relative_error(got, true) <= limit
    (chain,) = fast.report.to_dict()["chains"]
    assert (chain["solver_forward"], chain["fallbacks"]) == ("newton", 0)
    assert 0 < chain["iterations"] <= 12
    assert chain["residual"] <= chain["tolerance"]


@pytest.mark.parametrize("name", ["residual", "gated", "attention", "layer norm", "softmax", "gelu"])
def test_newton_solves_every_body(name: str, threads: int) -> None:
    model = Deep(name, 9).double()
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    x = states(name, 3)
    fast = by_kernel(model, x, "newton")
    assert_solved(fast, model, x, 1e-11)
    if name == "residual":
        twin = pcr_fx.transform(model, x, {"solver": "newton", "kernels": False})
        assert relative_error(fast(x), twin(x)) <= 1e-12
        counts = [run.report.to_dict()["chains"][0]["iterations"] for run in (fast, twin)]
        assert abs(counts[0] - counts[1]) <= 1


@pytest.mark.parametrize("batch", [1, 2, 33])
@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 7, 8, 9, 127, 128, 129])
def test_newton_at_every_length_and_batch(length: int, batch: int, threads: int) -> None:
    model, x = Deep("residual", length), states("residual", batch)
    for parameter in model.parameters():
        parameter.data.mul_(0.3)
    assert_solved(by_kernel(model, x, "newton", min_length=2), model, x, 1e-10)


def test_newton_with_more_features_than_lanes(threads: int) -> None:
    torch.manual_seed(0)
    for width in (7, 8, 9, 20):
        model, x = plain_mlp(30, width).double(), torch.randn(2, width, dtype=torch.float64)
        assert_solved(by_kernel(model, x, "newton"), model, x, 1e-11)


def test_newton_in_float32(threads: int) -> None:
    torch.manual_seed(0)
    model, x = plain_mlp(300, 17), torch.randn(3, 17)
    assert_solved(by_kernel(model, x, "newton"), model, x, 1e-5)


def test_newton_gives_up_a_chaotic_chain(threads: int) -> None:
    torch.manual_seed(0)
    model, x = Diverging(40).double(), torch.randn(3, 5, dtype=torch.float64)
    fast = by_kernel(model, x, "newton")
    expected = pcr_fx.transform(model, x, {"solver": "sequential"})(x)
    assert torch.equal(fast(x), expected)
    (chain,) = fast.report.to_dict()["chains"]
    assert chain["fallbacks"] == 1
    assert chain["iterations"] < 33
    with pytest.raises(pcr_fx.SolveError):
        by_kernel(model, x, "newton", on_failure="raise")(x)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_newton_hands_what_is_not_finite_to_the_blocks_themselves(bad: float, threads: int) -> None:
    model, x = Deep("residual", 9).float(), states("residual", 17, torch.float32)
    x[1, 2] = bad
    fast = by_kernel(model, x, "newton")
    ours, theirs = fast(x), model(x)
    assert torch.equal(ours.isnan(), theirs.isnan())
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_newton_of_several_carried_tensors(threads: int) -> None:
    torch.manual_seed(0)
    model = Recurrence(nn.LSTMCell(3, 5)).double()
    inputs = (
        torch.randn(20, 4, 3, dtype=torch.float64),
        *(torch.randn(4, 5, dtype=torch.float64) for _ in range(2)),
    )
    fast = pcr_fx.transform(model, inputs, {"solver": "newton"})
    for got, true in zip(fast(*inputs), model(*inputs), strict=True):
        assert relative_error(got, true) <= 1e-11
    (chain,) = fast.report.to_dict()["chains"]
    assert (chain["solver_forward"], chain["fallbacks"]) == ("newton", 0)
    assert chain["residual"] > 0
