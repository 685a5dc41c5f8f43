"""`transform` reads forwards that branch on what depends on constants alone, and traces anew where a constant has changed."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pcr_fx
from pcr_fx.errors import CaptureError

OPTIONS = {"solver": "sequential", "kernels": False}


class Checked(nn.Module):
    """A solver that looks at its grid, which is a buffer or made in the forward."""

    def __init__(self, is_buffer: bool) -> None:
        super().__init__()
        self.linear, self.is_buffer = nn.Linear(3, 3), is_buffer
        self.register_buffer("grid", torch.linspace(0, 1, 13))

    def forward(self, y: Tensor) -> Tensor:
        grid = self.grid if self.is_buffer else torch.linspace(0, 1, 13)
        if not (grid[1:] > grid[:-1]).all():
            raise ValueError("the grid must increase")
        step = float(grid[1] - grid[0])
        for _ in range(round(grid[-1].item() / step)):
            y = y + step * torch.tanh(self.linear(y))
        return y


def lengths(fast: Any) -> list[int]:
    return [chain["length"] for chain in fast.report.to_dict()["chains"]]


@pytest.mark.parametrize("is_buffer", [True, False])
def test_a_grid_is_looked_at(is_buffer: bool) -> None:
    model, y = Checked(is_buffer), torch.randn(2, 3)
    fast = pcr_fx.transform(model, example_inputs=y, options=OPTIONS)
    torch.testing.assert_close(fast(y), model(y))
    assert lengths(fast) == [12]


def test_a_changed_buffer_is_another_constant() -> None:
    model, y = Checked(True), torch.randn(2, 3)
    fast = pcr_fx.transform(model, example_inputs=y, options=OPTIONS)
    fast(y)
    model.grid[-1] = 2.0
    torch.testing.assert_close(fast(y), model(y))
    assert lengths(fast) == [24]
    fast.grid = torch.linspace(0, 1, 11)
    assert lengths(fast) == [10]
    model.grid.copy_(model.grid.flip(0))
    fast.grid = model.grid
    with pytest.raises(CaptureError, match="the grid must increase"):
        fast(y)


class Scheduled(nn.Module):
    """A grid that is written to, a mask of ones, a place that is looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("times", torch.linspace(0, 1, 12))

    def forward(self, y: Tensor) -> Tensor:
        grid = torch.arange(0.0, 14.0)
        before, view = grid.clone(), grid[1:]
        grid[-1] = 20.0
        view[0] = 1.5
        assert before[-1] == 13 and before[1] == 1 and grid[1] == 1.5
        assert torch.ones_like(y, dtype=torch.uint8)[0].all() and not y.new_zeros(3).any()
        for time in before[:12]:
            index = torch.bucketize(time / 14, self.times)
            y = y + self.times[index] * torch.tanh(self.linear(y))
        return torch.where(torch.ones_like(y, dtype=torch.uint8), y, grid[-1])


@pytest.mark.filterwarnings("ignore:where received a uint8 condition")
def test_constants_that_are_written_to() -> None:
    model, y = Scheduled(), torch.randn(2, 3)
    fast = pcr_fx.transform(model, example_inputs=y, options=OPTIONS)
    torch.testing.assert_close(fast(y), model(y))
    assert lengths(fast) == [12]
    torch.testing.assert_close(fast(y.repeat(2, 1)), model(y.repeat(2, 1)))


def test_constants_require_no_gradients() -> None:
    class Asserting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            grid = torch.linspace(0, 1, 3) * self.scale
            leaf = torch.ones(3).requires_grad_()
            if grid.requires_grad:
                return x
            return x * grid * leaf

    model, x = Asserting(), torch.randn(3)
    fast = pcr_fx.transform(model, example_inputs=x)
    torch.testing.assert_close(fast(x), model(x))
    fast.scale.requires_grad_()
    with pytest.raises(CaptureError, match="asks for requires_grad"):
        fast(x)


class Branches(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "count":
            self.count += 1
        condition = {
            "input": lambda: x.sum() > 0,
            "parameter": lambda: self.weight.sum() > 0,
            "random": lambda: torch.rand(()) > 0.5,
            "count": lambda: self.count > 3,
            "written": lambda: _written(x) > 0,
        }[self.kind]()
        return x * self.weight if condition else x


def _written(x: Tensor) -> Tensor:
    constant = torch.zeros(3)
    view = constant[1:]
    view[0] = x.sum()
    return constant[1]


@pytest.mark.parametrize("kind", ["input", "parameter", "random", "count", "written"])
def test_what_changes_from_call_to_call_is_refused(kind: str) -> None:
    with pytest.raises(CaptureError, match="branches on the value of a tensor"):
        pcr_fx.transform(Branches(kind), example_inputs=torch.randn(3))


class Masked(nn.Module):
    """It keeps to the features that a mask names, whose places it looks up at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        kept = x[:, self.mask.nonzero().squeeze(-1)]
        for _ in range(kept.shape[1] * 4):
            kept = kept + 0.1 * torch.tanh(self.linear(kept) if kept.shape[1] == 3 else kept)
        return kept


def test_what_a_mask_names_is_counted() -> None:
    model, x = Masked(), torch.randn(2, 4)
    fast = pcr_fx.transform(model, example_inputs=x, options=OPTIONS)
    torch.testing.assert_close(fast(x), model(x))
    assert lengths(fast) == [12]
    model.mask[0] = False
    torch.testing.assert_close(fast(x), model(x))
    assert lengths(fast) == [8]
    with pytest.raises(CaptureError, match="nonzero"):
        pcr_fx.transform(Counting(), x, OPTIONS)


class Counting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[(x > 0).any(-1).nonzero().squeeze(-1)]


class Made(OrderedDict[str, Any]):
    """A table of activations, each made when it is looked up, as in transformers."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)(3, 3)


MADE = Made({"linear": nn.Linear})


def test_a_table_whose_look_up_makes_modules_is_left_in_peace() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = MADE["linear"]

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(10 if "linear" in MADE else 0):
                x = torch.tanh(self.linear(x))
            return x

    model, x = Looking(), torch.randn(2, 3)
    fast = pcr_fx.transform(model, x, OPTIONS)
    torch.testing.assert_close(fast(x), model(x))
    assert lengths(fast) == [10]
