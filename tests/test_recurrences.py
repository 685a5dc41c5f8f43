"""Training recurrences by native kernels: gradients of weights that all steps share, and of all else, beside a plain loop's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import relative_error
from torch import Tensor, nn

import pcr_fx
from pcr_fx.targets import CppKernel

SEQUENTIAL = {"solver": "sequential"}
CELLS = {"GRU": nn.GRUCell, "LSTM": nn.LSTMCell, "RNN": nn.RNNCell}


@pytest.fixture(autouse=True)
def adjoints(monkeypatch: pytest.MonkeyPatch) -> list[CppKernel]:
    """The kernels whose adjoint was called."""
    called: list[CppKernel] = []
    adjoint = CppKernel.solve_adjoint

    def spy(kernel: CppKernel, *args: Any, **options: Any) -> Any:
        called.append(kernel)
        return adjoint(kernel, *args, **options)

    monkeypatch.setattr(CppKernel, "solve_adjoint", spy)
    return called


def looped(step: Any, carry: Any, xs: Any) -> tuple[Any, Tensor]:
    outputs = []
    for x in zip(*xs, strict=True) if isinstance(xs, tuple) else xs:
        carry, y = step(carry, x)
        outputs.append(y)
    return carry, torch.stack(outputs)


def assert_same(step: Any, carry: Any, xs: Any, leaves: list[Tensor], bound: float = 1e-12) -> None:
    """Values and gradients of the loop as a kernel are those of the loop."""
    results = []
    for loop in (looped, lambda *given: pcr_fx.scan(*given, options=SEQUENTIAL)):
        last, ys = loop(step, carry, xs)
        last = last[0] + last[1].sin() if isinstance(last, tuple) else last
        score = (ys * torch.linspace(-1, 1, ys.numel(), dtype=ys.dtype).view_as(ys)).sum() + last.square().sum()
        results.append([last, ys, *torch.autograd.grad(score, leaves)])
    for true, got in zip(*results, strict=True):
        assert relative_error(got, true) <= bound


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize(("kind", "width", "batch"), [("GRU", 5, 1), ("GRU", 33, 3), ("LSTM", 16, 1), ("RNN", 46, 33)])
def test_cells(kind: str, width: int, batch: int, adjoints: list[CppKernel]) -> None:
    """One kernel for every length; vectors are kept for some hundred steps or rows at a time."""
    torch.manual_seed(width)
    cell = CELLS[kind](7, width).double()

    def step(carry: Any, x: Tensor) -> tuple[Any, Tensor]:
        carry = cell(x, carry)
        return carry, carry[0] if kind == "LSTM" else carry

    for length in (1, 7, 300):
        first = [numbers(batch, width).requires_grad_() for _ in range(2 if kind == "LSTM" else 1)]
        xs = numbers(length, batch, 7).requires_grad_()
        carry = tuple(first) if kind == "LSTM" else first[0]
        assert_same(step, carry, xs, [xs, *first, *cell.parameters()])
    assert len(adjoints) == 3


def test_weights_that_are_frozen(adjoints: list[CppKernel]) -> None:
    cell = nn.GRUCell(4, 16).double()
    cell.weight_hh.requires_grad_(False)
    wanted = [p for p in cell.parameters() if p.requires_grad]
    assert_same(lambda h, x: (cell(x, h), h), numbers(1, 16), numbers(21, 1, 4), wanted)
    assert adjoints


@pytest.mark.parametrize("batch", [3, 33])
def test_threads(batch: int, adjoints: list[CppKernel]) -> None:
    """Each has samples, with what it computes before of these, and with vectors and a sum of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        weight, into = ((0.1 * numbers(96, 96)).requires_grad_() for _ in range(2))
        xs = numbers(70, batch, 96)
        assert_same(lambda h, x: ((h @ weight + x @ into).tanh(), h), numbers(batch, 96), xs, [weight, into])
    finally:
        torch.set_num_threads(before)
    assert adjoints


@pytest.mark.parametrize("batch", [1, 2, 33])
def test_weights_of_each_step_beside_shared_ones(batch: int, adjoints: list[CppKernel]) -> None:
    """Each step has a matrix and a vector of its own; one shared matrix is used twice, turned the second time."""
    shared, into = ((numbers(12, 12) / 4).requires_grad_() for _ in range(2))
    own, bias, xs = ((numbers(20, *shape) / 4).requires_grad_() for shape in ((12, 12), (12,), (batch, 12)))

    def step(h: Tensor, given: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        w, b, x = given
        inner = torch.tanh(h @ shared + x @ into + b)
        return (inner @ w) @ shared.T + x, inner.square()

    assert_same(step, numbers(batch, 12), (own, bias, xs), [shared, into, own, bias, xs])
    assert adjoints


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite(bad: float) -> None:
    """It reaches the gradients that it reaches in a plain loop: lanes that idle have no part in a sum."""
    weight = (numbers(96, 96) / 10).requires_grad_()
    xs = numbers(5, 9, 96)
    xs[2, 8, 3] = bad

    def gradients(loop: Any) -> Tensor:
        _, ys = loop(lambda h, x: (torch.tanh(h @ weight) + x, h), numbers(9, 96) * 0, xs)
        (gradient,) = torch.autograd.grad(ys.sum(), weight)
        return gradient

    true, got = gradients(looped), gradients(lambda *given: pcr_fx.scan(*given, options=SEQUENTIAL))
    assert torch.equal(true.isnan(), got.isnan())
    assert torch.equal(true.isinf(), got.isinf())


class Leaky(nn.Module):
    """Neurons that are fed by a product which no state takes part in: it has the size that their dimension has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        voltage = current = torch.zeros(x.shape[1], 5, dtype=x.dtype)
        for step in x.unbind(0):
            voltage = voltage + 0.1 * (current - voltage)
            current = 0.8 * current + self.inner(step) * torch.sigmoid(voltage)
        return voltage


def test_what_is_computed_without_the_state_fixes_no_size_of_the_batch(adjoints: list[CppKernel]) -> None:
    model = Leaky().double()
    fast = pcr_fx.transform(model, torch.randn(12, 4, 3, dtype=torch.float64), {"planning": "estimated"})
    for batch in (4, 3, 7):
        x = torch.randn(12, batch, 3, dtype=torch.float64, requires_grad=True)
        leaves = [x, *model.parameters()]
        y, expected = fast(x), model(x)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)
        got, known = (torch.autograd.grad(one.square().sum(), leaves) for one in (y, expected))
        torch.testing.assert_close(got, known, rtol=1e-11, atol=1e-13)
    (chain,) = fast.report.to_dict()["chains"]
    assert chain["native_forward"] and chain["native_backward"] and chain["batch_dims"] == [0]
    assert adjoints
