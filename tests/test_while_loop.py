"""PyTorch's `while_loop` with `backend="deeppcr"`: where it counts it is a chain; where data ends it, it stays as it is."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scan_cases import F64, IN_OPS, assert_same, real
from torch import Tensor
from torch._higher_order_ops import associative_scan, map, while_loop

import pcr_fx
from pcr_fx import counters

OPTIONS = {"inner_backend": "eager", **IN_OPS}
W, ROWS, COLUMNS = real(3, 3), real(40, 3), real(3, 40)


def plain(condition: Callable[..., Any], body: Callable[..., Any], carry: Any) -> Any:
    while condition(*carry):
        carry = body(*carry)
    return carry


def same(got: Any, expected: Any, leaves: Any = ()) -> None:
    """The same, of numbers too."""
    assert [type(one) for one in got] == [type(one) for one in expected]
    assert_same(*([torch.as_tensor(one) for one in each] for each in (got, expected)), leaves)


def check(function: Callable[..., Any], numbers: Any, leaves: Any = (W,), length: int = 8, **options: Any) -> None:
    """The numbers and gradients of a plain loop, by a chain."""
    compiled = torch.compile(function, backend="deeppcr", fullgraph=True, options=OPTIONS | options)
    for number in numbers:
        x = real(2, 3)
        same(compiled(while_loop, x, number), function(plain, x, number), [x, *leaves] if leaves else ())
    (chain,) = pcr_fx.report().to_dict()["chains"]
    assert chain["modules"] == "while_loop (a loop)"
    assert chain["source"].startswith("test_while_loop.py:")
    assert chain["length"] == length


@pytest.fixture(autouse=True)
def _anew() -> None:
    torch._dynamo.reset()


def test_up_to_a_number_of_the_call() -> None:
    def function(run: Any, x: Tensor, n: Any) -> Any:
        count, h = run(
            lambda i, h: i < n, lambda i, h: (i + 1, torch.tanh(h @ W) + 0.1 * i), (torch.tensor(0), x.sin())
        )
        return count + 1, h.cos()

    check(function, (7, 0, 12, 1, 33, 8))
    check(function, (torch.tensor(12), torch.tensor(0), torch.tensor(8)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_downwards_with_more_handed_on(dtype: torch.dtype) -> None:
    def function(run: Any, x: Tensor, n: Tensor) -> Any:
        def body(h: Tensor, i: Tensor, c: Tensor) -> Any:
            return torch.tanh(h @ W) + 0.1 * c, i - 3, h * 1.0 + i

        return run(lambda h, i, c: i >= 2, body, (x.sin(), n, x))

    check(function, (torch.tensor(one, dtype=dtype) for one in (31, 2, 1, -7, 25)))


def test_rows_at_the_counter() -> None:
    def function(run: Any, x: Tensor, n: Tensor) -> Any:
        def body(i: Tensor, h: Tensor) -> Any:
            h = torch.tanh(h @ W) + ROWS.index_select(0, i.reshape(1)) * ROWS[i.unsqueeze(0)]
            return i + 2, h + COLUMNS.index_select(1, i.view(1)).sum(1)

        return run(lambda i, h: i <= 20, body, (n, x))

    check(function, (torch.tensor(one) for one in (3, 19, 22, 6)), [W, ROWS, COLUMNS])
    with pytest.raises(IndexError):
        torch.compile(function, backend="deeppcr", options=OPTIONS)(while_loop, real(2, 3), torch.tensor(-1))


def test_a_counter_that_is_a_number() -> None:
    def function(run: Any, x: Tensor, n: int) -> Any:
        i, h = run(lambda i, h: i < n, lambda i, h: (3 + i, torch.sin(h) + (2 * i + 1) // 4 + ROWS[i]), (2, x.sin()))
        return h.cos() + i, i * 2

    with torch.no_grad():
        check(function, (5, 28, 2, 21), (), 7)


def test_rows_of_steps() -> None:
    for steps in (range(0, 7, 3), range(6, -1, -2), range(5, 6)):
        for keeps, dim in ((False, 0), (True, 1), (False, -1)):
            tensor = torch.randn(7, 7, 7)
            expected = torch.stack(
                [tensor.select(dim, at).unsqueeze(dim) if keeps else tensor.select(dim, at) for at in steps]
            )
            assert torch.equal(counters.Rows(0, dim, keeps).of(tensor, steps), expected)
    # What counts from the end, and what is not there, is read, or refused, as the loop is written.
    assert counters.Rows(0, 0, False).of(torch.randn(7), range(-1, 3)) is None
    assert counters.Rows(0, 0, False).of(torch.randn(7), range(8)) is None


@pytest.mark.parametrize("use", [lambda i: i * 0.1, lambda i: torch.full((3,), i), lambda i: i + torch.tensor(1)])
def test_a_number_that_no_tensor_stands_for(use: Any) -> None:
    def function(run: Any, x: Tensor, n: int) -> Any:
        return run(lambda i, h: i < 9, lambda i, h: (i + 1, torch.sin(h) + use(i)), (n, x))

    with torch.no_grad():
        compiled, x = torch.compile(function, backend="deeppcr", options=OPTIONS), real(2, 3)
        same(compiled(while_loop, x, 2), function(plain, x, 2))
    assert "is a number that" in pcr_fx.report().rejected[0].reason


def test_a_counter_that_its_dtype_does_not_hold() -> None:
    def function(run: Any, x: Tensor, n: Tensor) -> Any:
        return run(lambda i, h: i < 120, lambda i, h: (i + 50, torch.sin(h) + i), (n, x))

    compiled = torch.compile(function, backend="deeppcr", options=OPTIONS)
    for start in (-60, 90):  # from 90 it goes on below -100
        x, n = real(2, 3), torch.tensor(start, dtype=torch.int8)
        same(compiled(while_loop, x, n), function(plain, x, n), [x])


def both(i: Tensor, h: Tensor) -> Any:
    return (i < 9) & (h.sum() < 100)


@pytest.mark.parametrize(
    ("condition", "body", "reason"),
    [
        (both, lambda i, h: (i + 1, h * 1.5), "no comparison of a counter"),
        (lambda i, h: h.sum() < 50, lambda i, h: (i + 1, h * 2), "no comparison of a counter|neither side"),
        (lambda i, h: i < 50, lambda i, h: (i * 2 + 1, h * 2), "neither side"),
        (lambda i, h: i < h.sum(), lambda i, h: (i + 1, h * 0.5), "no whole number that stays"),
        (lambda i, h: i < 4.5, lambda i, h: (i + 1, h * 0.5), "no whole number that stays"),
    ],
)
def test_what_data_ends_stays_as_it_is(condition: Any, body: Any, reason: str, caplog: Any) -> None:
    compiled = torch.compile(
        lambda x: while_loop(condition, body, (torch.tensor(0), x)), backend="deeppcr", options=OPTIONS
    )
    x = torch.rand(2, 3, dtype=F64)
    with caplog.at_level(logging.WARNING, "pcr_fx"):
        same(compiled(x), plain(condition, body, (torch.tensor(0), x)))
    (miss,) = pcr_fx.report().rejected
    assert miss.source.startswith("test_while_loop.py:")
    assert "runs as it is written: its condition depends on data" in miss.reason
    assert any(part in miss.reason for part in reason.split("|"))
    assert miss.reason.partition(": ")[2] in caplog.text


def test_other_operators_are_left_as_they_are() -> None:
    def function(x: Tensor) -> Any:
        return map(lambda row: row.sin(), x), associative_scan(lambda a, b: a * b, x, dim=0, combine_mode="generic")

    x = torch.rand(5, 3, dtype=F64)
    compiled = torch.compile(function, backend="deeppcr", fullgraph=True, options={"inner_backend": "eager"})
    same(compiled(x), (x.sin(), x.cumprod(0)))
    assert not pcr_fx.report().chains
