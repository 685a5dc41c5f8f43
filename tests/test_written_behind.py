"""What a chain is given may be written to behind it: its backward reads what was there when it ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pcr_fx

DEPTH, WIDTH = 12, 4


class Layers(nn.Module):
    """Layers with offsets that nothing trains, and a write to some of them behind the last."""

    def __init__(self, write: Callable[[Layers, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.write = write
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.offsets: list[Tensor]
        for block in range(DEPTH):
            self.register_buffer(f"offset_{block}", torch.randn(WIDTH))
        self.register_buffer("common", torch.randn(WIDTH))
        self.register_buffer("factor", torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        start = x * 2
        state = start + 1
        for block, layer in enumerate(self.layers):
            state = torch.tanh(layer(state) * self.factor + getattr(self, f"offset_{block}") + self.common)
        self.write(self, start)
        return state * start.sum()


WRITES: dict[str, Callable[[Layers, Tensor], Any]] = {
    "the initial state": lambda model, start: start.add_(1),
    "a view of the initial state": lambda model, start: start.view(-1)[:3].mul_(2),
    "what every block reads": lambda model, start: model.common.add_(1),
    "what one block reads": lambda model, start: model.offset_5[:2].add_(1),
}
WAYS = {
    "transform": lambda model, x, options: pcr_fx.transform(model, x, options),
    # Inductor's own backward reads what was written, or refuses to run.
    "compile": lambda model, x, options: torch.compile(
        model, backend="deeppcr", options={**options, "inner_backend": "eager"}
    ),
}


def report_of(fast: Any) -> pcr_fx.RewriteReport:
    return pcr_fx.report(fast if isinstance(fast, pcr_fx.TransformedModule) else None)


@pytest.fixture(autouse=True)
def _compiled_anew() -> None:
    torch.compiler.reset()


def results(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Of a call and its gradients, and what was written."""
    leaf = x.clone().requires_grad_()
    total = run(leaf).sum()
    gradients = torch.autograd.grad(total, [leaf, *model.parameters()])
    return [total.detach(), *gradients, *(buffer.clone() for buffer in model.buffers())]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{"solver": "newton", "kernels": False}, {"solver": "sequential"}], ids=str)
@pytest.mark.parametrize("write", WRITES)
def test_gradients_are_of_what_was_there(write: str, options: dict[str, Any], way: str) -> None:
    model, reference = Layers(WRITES[write]).double(), Layers(WRITES[write]).double()
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    fast = WAYS[way](model, x, options)
    expected = results(reference, reference, x)
    for got, true in zip(results(model, fast, x), expected, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-8, atol=1e-10)
    assert report_of(fast).chains


def hidden_write(model: Layers, start: Tensor) -> None:
    model.factor.data.mul_(0.5)


@pytest.mark.parametrize("way", WAYS)
def test_what_autograd_does_not_see_written_is_read_by_the_backward_as_in_eager(way: str) -> None:
    model, reference = Layers(hidden_write).double(), Layers(hidden_write).double()
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    fast = WAYS[way](model, x, {"kernels": False})
    for got, true in zip(results(model, fast, x), results(reference, reference, x), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)
    assert not report_of(fast).chains and "writes to" in str(report_of(fast))


class Counted(nn.Module):
    """Layers that read what is written to behind them, where nothing else depends on the write."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.offset: Tensor
        self.register_buffer("offset", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        state = x * 2
        for layer in self.layers:
            state = torch.tanh(layer(state) + self.offset)
        self.offset.add_(1)
        return state


def test_a_write_that_nothing_depends_on_keeps_its_place_around_native_kernels() -> None:
    model, reference = Counted().double(), Counted().double()
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    fast = WAYS["compile"](model, x, {"solver": "sequential"})
    for got, true in zip(results(model, fast, x), results(reference, reference, x), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-8, atol=1e-10)
    assert report_of(fast).chains


class Table(nn.Module):
    """Layers whose offsets are rows of a table, which is written to at some place."""

    def __init__(self, write: Callable[[Any], Any], at: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.write, self.at = write, at
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH).double() for _ in range(DEPTH))
        self.register_buffer("table", torch.randn(DEPTH, WIDTH, dtype=torch.float64))
        for block in range(DEPTH):
            self.register_buffer(f"row_{block}", self.table[block])  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        state = x * 2
        for block, layer in enumerate(self.layers):
            if block == self.at:
                self.write(self)
            state = torch.tanh(layer(state)) + getattr(self, f"row_{block}")
        if self.at == DEPTH:
            self.write(self)
        return state


TABLE_WRITES: dict[str, Callable[[Any], Any]] = {
    "the table": lambda model: model.table.add_(1),
    "a view of it": lambda model: model.table.view(-1)[5:].mul_(2),
    "a row": lambda model: model.row_7.add_(1),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at", [0, DEPTH // 2, DEPTH])
@pytest.mark.parametrize("write", TABLE_WRITES)
def test_rows_of_a_table_that_is_written_to(write: str, at: int, way: str) -> None:
    model, reference = Table(TABLE_WRITES[write], at), Table(TABLE_WRITES[write], at)
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    fast = WAYS[way](model, x, {"planning": "estimated", "min_length": 4})
    for _ in range(2):
        for got, true in zip(results(model, fast, x), results(reference, reference, x), strict=True):
            torch.testing.assert_close(got, true, rtol=1e-8, atol=1e-10)
    assert report_of(fast).chains or 0 < at < DEPTH
