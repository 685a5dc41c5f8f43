"""One transformed model called with one length after another: its blocks are the same, and so are their kernel and plan."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from comparison import relative_error
from torch import Tensor, nn

import pcr_fx
from pcr_fx.planner import Timing, plan

pytestmark = pytest.mark.usefixtures("kernel_cache")


class Decay(nn.Module):
    """A loop over the steps of its input, whose numbers may differ from step to step."""

    def __init__(self, numbers: str) -> None:
        super().__init__()
        self.weight, self.numbers = nn.Parameter(torch.randn(3, 3, dtype=torch.float64) / 3), numbers

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for index in range(x.shape[1]):
            scale = {"none": 1.0, "of the step": 1 / (1 + index), "of the length": 1 / x.shape[1]}[self.numbers]
            h = torch.tanh(h @ self.weight + x[:, index]) * scale
        return h


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the chains that programs are built for."""
    lengths: list[int] = []
    build = plan.build_program

    def building(chain: Any, *others: Any) -> Any:
        lengths.append(chain.length)
        return build(chain, *others)

    monkeypatch.setattr(plan, "build_program", building)
    return lengths


@pytest.mark.parametrize(
    "options", [{"solver": "sequential"}, {"solver": "newton"}, {"solver": "newton", "kernels": False}, {}]
)
@pytest.mark.parametrize("numbers", ["none", "of the step", "of the length"])
def test_lengths_one_after_another(numbers: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, model = counted(monkeypatch), Decay(numbers)
    fast = pcr_fx.transform(model, torch.randn(2, 12, 3, dtype=torch.float64), options)
    before = len(lengths)
    for length in (12, 30, 9, 12, 40):
        x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
        found, expected = fast(x), model(x)
        assert relative_error(found, expected) < 1e-9
        leaves = (x, model.weight)
        for a, b in zip(*(torch.autograd.grad(one.cos().sum(), leaves) for one in (found, expected)), strict=True):
            assert relative_error(a, b) < 1e-9
        (chain,) = pcr_fx.report(fast).chains
        assert chain.chain.length >= length - 1
    if numbers != "of the length":  # a number that all blocks share is part of what they compute
        assert len(lengths) == before


def test_blocks_that_differ_have_plans_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = counted(monkeypatch)
    for factor in (0.5, 0.25):

        def step(z: Tensor, w: Tensor, _: Any, factor: float = factor) -> Tensor:
            return torch.sin(z * w) * factor

        z, weights = torch.ones(2, dtype=torch.float64), torch.randn(10, 2, dtype=torch.float64)
        expected = z
        for weight in weights:
            expected = step(expected, weight, ())
        torch.testing.assert_close(pcr_fx.solve_chain(step, z, weights, options={"solver": "newton"}).final, expected)
    assert len(lengths) == 2


def test_few_blocks_that_are_left_alone_say_nothing_of_many() -> None:
    fast = pcr_fx.transform(Decay("none"), torch.randn(2, 12, 3, dtype=torch.float64), {"planning": "estimated"})
    few = pcr_fx.report(fast).chains[0].plan
    assert few is not None
    (size,) = few.learnt.choices
    measured = replace(few.choice(2), timings=(Timing("eager", "forward", 1e-5),), alone=((False, True), (True, False)))
    few.learnt.choices[size] = measured
    assert measured.leaves_alone(False)
    many = few.for_chain(few.program.chain.of_length(200)).choice(2)
    assert many.alone == ((True, False),)
    assert not many.leaves_alone(False)
