"""Loops of any length within what `torch.compile` compiles, PyTorch's own among them, and what reports tell of loops."""

import logging
from typing import Any

import pytest
import torch
from scan_cases import IN_OPS, Cell, assert_same, plain_loop, real
from torch import Tensor

import pcr_fx
from pcr_fx import UnsupportedError, scan


@pytest.mark.parametrize(
    ("message", "step"),
    [
        ("must have the shapes", lambda h, x: (h.sum(), x)),
        (r"\[1\] torch.float32 became \[3\]", lambda h, x: (h + x, x)),
        ("must have the shapes", lambda h, x: (h.double(), x)),
        ("structure of init", lambda h, x: ((h, h), x)),
        ("structure of init", lambda h, x: ([h * 2], x)),
        ("must be tensors or None", lambda h, x: (h * 2, 1.0)),
    ],
)
def test_bad_input_within_torch_compile(message: str, step: Any) -> None:
    torch._dynamo.reset()
    with pytest.raises(UnsupportedError, match=message):
        torch.compile(lambda h, x: scan(step, h, x), backend="eager")(torch.ones(1), torch.ones(4, 3))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "deeppcr"])
def test_within_torch_compile(backend: str) -> None:
    cell = Cell()

    def loop(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h, y = scan(cell, h, x.sin(), reverse=True)
        return h.cos(), y

    def plain(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h, y = plain_loop(cell, h, x.sin(), reverse=True)
        return h.cos(), y

    options = {"options": {"inner_backend": "aot_eager"}} if backend == "deeppcr" else {}
    compiled = torch.compile(loop, backend=backend, fullgraph=True, **options)
    for length in (6, 9):
        h, x = real(2, 3), real(length, 2, 3)
        assert_same(compiled(h, x), plain(h, x), [h, x, cell.w])


def test_a_graph_that_breaks_at_a_loop() -> None:
    def branching(h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
        return (h + x if h.sum() > 0 else h - x), (h, None)

    def loop(run: Any, h: Tensor, x: Tensor) -> Any:
        h, y = run(branching, h.sin(), x)
        return h.cos(), y

    h, x = real(3), real(5, 3)
    compiled = torch.compile(loop, backend="eager")
    assert_same(compiled(scan, h, x), loop(plain_loop, h, x), [h, x])


@pytest.mark.parametrize("dynamic", [None, True])
def test_pytorchs_own_scan_becomes_a_chain(dynamic: bool | None) -> None:
    w, graphs = real(3, 3), []

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
        h = torch.tanh(h @ w + x)
        return h, (h * 2, h.sum(-1))

    def loop(run: Any, h: Tensor, x: Tensor) -> Any:
        h, y = run(step, h, x.sin(), dim=0)
        return h.cos(), y

    def inner(graph_module: Any, inputs: Any) -> Any:
        graphs.append(graph_module)
        return graph_module.forward

    options = {"inner_backend": inner, "planning": "estimated"}
    compiled = torch.compile(loop, backend="deeppcr", fullgraph=True, dynamic=dynamic, options=options)
    for length in (6, 9, 12, 7):
        h, x = real(2, 3), real(length, 2, 3)
        assert_same(compiled(torch._higher_order_ops.scan, h, x), loop(plain_loop, h, x), [h, x, w])
        if length == 9:
            before = len(graphs)
    assert len(graphs) == before
    (chain,) = pcr_fx.report().to_dict()["chains"]
    assert chain["native_forward"]


def test_reports() -> None:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, None]:
        return torch.tanh(h + x), None

    def branching(h: Tensor, x: Tensor) -> tuple[Tensor, None]:
        return (h + x if h.sum() > 0 else h - x), None

    with pytest.raises(UnsupportedError, match=r"a step that pcr_fx\.scan ran"):
        pcr_fx.report(step)
    for one in (step, branching):
        scan(one, real(2), real(12, 2), options=IN_OPS)
    report = pcr_fx.report(step)
    assert report.to_dict()["chains"][0]["length"] == 12
    assert "step (a loop)" in str(report)
    assert "branching" in str(pcr_fx.report(branching))


def test_advice_for_loops_that_change_their_length(caplog: pytest.LogCaptureFixture) -> None:
    def model(h: Tensor, x: Tensor) -> Tensor:
        for t in range(x.shape[0]):
            h = torch.tanh(0.7654 * h + x[t])
        return h

    compiled = torch.compile(model, backend="deeppcr", dynamic=False, options={"inner_backend": "eager"})
    with caplog.at_level(logging.WARNING, "pcr_fx.backend"):
        for length in (10, 11, 12, 13):
            compiled(torch.ones(2), torch.ones(length, 2))
    (told,) = (record.message for record in caplog.records if "changes its length" in record.message)
    assert "test_scan_compiled.py:" in told
    assert told in pcr_fx.report().notes


def test_models_of_other_depths_are_no_loops_that_change_their_length(caplog: pytest.LogCaptureFixture) -> None:
    def stages(h: Tensor) -> Tensor:
        for length in (9, 10, 11):
            for _ in range(length):
                h = torch.sin(0.8765 * h + 1)
            h = h.cumsum(0)
        return h

    options = {"inner_backend": "eager"}
    with caplog.at_level(logging.WARNING, "pcr_fx.backend"):
        torch.compile(stages, backend="deeppcr", options=options)(torch.ones(2))
        for depth in (8, 9, 10, 11):
            torch._dynamo.reset()
            layers = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(depth)))
            torch.compile(layers, backend="deeppcr", options=options)(torch.ones(2, 3))
        scanned = torch.compile(
            lambda h, x: scan(lambda c, _: (torch.cos(c), None), h, x)[0], backend="deeppcr", dynamic=False
        )
        for steps in (10, 11, 12, 13):
            scanned(torch.ones(2), torch.ones(steps, 2))
    assert not [record for record in caplog.records if "changes its length" in record.message]
