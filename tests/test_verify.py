"""`pcr_fx.verify`: right is told from wrong, and the model given stays as it is."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import ResidualNet, plain_mlp
from torch import Tensor, nn

import pcr_fx
from pcr_fx import comparison, verification
from pcr_fx.options import CHOICES

IN_OPS = {"solver": "sequential", "kernels": False}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_MOST_ROUNDS", 3)
    torch.manual_seed(0)


def test_every_solver_is_compared_in_float64() -> None:
    model, x = ResidualNet(9), torch.randn(4, 3)
    found = pcr_fx.verify(model, x, solver="all", options={"kernels": False, "planning": "estimated"})
    assert [way.solver for way in found.ways] == list(CHOICES["solver"])
    assert found.is_right and found.own.is_right and found.reference == "the model in float64"
    for way in (found.own, *found.ways):
        assert way.errors is not None and way.errors.gradients is not None and not way.fallbacks
        assert 0 < way.errors.outputs < 1e-5 and 0 < way.errors.gradients < 1e-4
        assert way.seconds and way.seconds_with_gradients and way.speedup
    assert found.own.speedup == 1.0
    json.dumps(found.to_dict())
    shown = str(found)
    assert "newton: right, and " in shown and "jacobi" in shown and "the model as it is" in shown
    assert found.ways[1].report is not None and len(found.ways[1].report.chains) == 1


def test_nothing_given_is_changed() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), *plain_mlp(9)).train()
    x = torch.randn(5, 4, requires_grad=True)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model[1].weight.grad = torch.ones(4, 4)
    assert pcr_fx.verify(model, x, options=IN_OPS).is_right
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert x.grad is None and torch.equal(model[1].weight.grad, torch.ones(4, 4))
    assert torch.equal(torch.get_rng_state(), random) and model.training


def _spoilt(transformed: nn.Module, spoil: Callable[[Tensor], Tensor]) -> Any:
    class Spoilt(nn.Module):
        report = transformed.report

        def forward(self, *given: Tensor) -> Tensor:
            return spoil(transformed(*given))

    return Spoilt()


@pytest.mark.parametrize(
    ("spoil", "worst"),
    [
        (lambda y: y + 1e-4, "output 0"),
        (lambda y: y * y.detach().sign().abs().where(torch.tensor([True, False]), torch.nan), "output 0"),
        (lambda y: y[:1], "output 0"),
        (lambda y: y.detach() + 1.001 * (y - y.detach()), "gradient of"),
        (lambda y: y if y.requires_grad else y + 1, "without gradients"),
    ],
)
def test_what_is_wrong_is_found_and_named(
    spoil: Callable[[Tensor], Tensor], worst: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    truly = verification.transform
    monkeypatch.setattr(verification, "transform", lambda *given: _spoilt(truly(*given), spoil))
    found = pcr_fx.verify(ResidualNet(9), torch.randn(4, 3), options=IN_OPS)
    (way,) = found.ways
    assert not found.is_right and not way.is_right and way.errors is not None and worst in way.errors.worst
    assert "WRONG" in found.verdict and worst in found.verdict and "PCR_FX_DISABLE=1" in found.verdict


def test_a_model_that_draws_numbers_is_compared_with_itself() -> None:
    found = pcr_fx.verify(ResidualNet(9, dropout=0.5), torch.randn(4, 3), options=IN_OPS)
    assert found.is_right and "random numbers that it draws" in found.reference


class Single(nn.Module):
    """Works in float32 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain_mlp(9)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise ValueError("no float64 here")
        return self.net(x)


def test_a_model_of_one_dtype_is_compared_with_itself() -> None:
    found = pcr_fx.verify(Single(), torch.randn(4, 4), through="compile", options={**IN_OPS, "inner_backend": "eager"})
    assert found.is_right and "ValueError: no float64 here" in found.reference
    assert found.ways[0].ran == "sequential"


def test_what_cannot_be_run_is_said() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    found = pcr_fx.verify(Branching(), torch.ones(3))
    assert not found.is_right and "NOT RUN: CaptureError" in found.verdict and found.ways[0].seconds is None
    assert found.own.seconds_with_gradients is None  # nothing in it has a gradient


def test_a_model_without_a_chain_is_right() -> None:
    found = pcr_fx.verify(nn.Linear(3, 2), torch.randn(4, 3))
    assert found.is_right and found.ways[0].ran == "no chain found"


def test_arguments_are_checked() -> None:
    with pytest.raises(pcr_fx.UnsupportedError, match="Module, got builtin_function_or_method"):
        pcr_fx.verify(torch.tanh)  # type: ignore[arg-type]
    with pytest.raises(pcr_fx.OptionError, match="through must be one of 'transform', 'compile', got 'onnx'"):
        pcr_fx.verify(nn.Linear(1, 1), torch.ones(1), through="onnx")
    with pytest.raises(pcr_fx.OptionError, match="solver='euler' is not allowed"):
        pcr_fx.verify(nn.Linear(1, 1), torch.ones(1), solver="euler")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        pcr_fx.verify(nn.Linear(2, 1), torch.ones(1, 3))


def test_small_gradients_are_judged_by_the_largest() -> None:
    """What is zero but for rounding has rounding of any size relative to itself."""
    truth = comparison.Results({}, {"large": torch.tensor([1.0]), "small": torch.tensor([1e-20])})
    own = comparison.Results({}, {"large": torch.tensor([1.0]), "small": torch.tensor([1e-9])})
    judge = comparison.Judge(truth, own, True, pcr_fx.Options())
    assert judge.errors(
        comparison.Results({}, {"large": torch.tensor([1.0]), "small": torch.tensor([5e-9])})
    ).are_allowed
    assert not judge.errors(
        comparison.Results({}, {"large": own.gradients["large"], "small": torch.tensor([1e-7])})
    ).are_allowed
