"""What the report says of what Dynamo made of the whole call: its graphs, graph breaks, and what it compiles no more."""

import logging

import pytest
import torch
from models import plain_mlp
from torch import Tensor, nn

import pcr_fx

pytestmark = pytest.mark.usefixtures("fresh_compiler")
OPTIONS = {"solver": "newton", "kernels": False, "inner_backend": "eager"}


def compiled(model, **options):
    return torch.compile(model, backend="deeppcr", options={**OPTIONS, **options})


def lengths(report: pcr_fx.RewriteReport) -> list[int]:
    return [chain["length"] for chain in report.to_dict()["chains"]]


def test_graph_breaks_are_told_with_their_lines_and_reasons() -> None:
    first, second = plain_mlp(10), plain_mlp(12)

    def forward(x: Tensor) -> Tensor:
        x = first(x)
        print("half-way")
        return second(x)

    x = torch.randn(2, 4)
    compiled(forward)(x)
    (outside,) = pcr_fx.report().outside
    assert outside.startswith("test_compilations.py:") and "print" in outside
    assert "Outside of the graphs" in str(pcr_fx.report())
    assert pcr_fx.report().to_dict()["outside"] == [outside]
    assert pcr_fx.explain(forward, x).outside == [outside]


class Net(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.net = plain_mlp(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_all_graphs_of_a_call_are_told_also_those_of_one_function() -> None:
    """A graph break in a loop has Dynamo leave the loop to Python, and compile what it calls, once for each module."""
    nets = nn.ModuleList([Net(10), Net(11), Net(12)])

    def forward(x: Tensor) -> Tensor:
        for net in nets:
            x = net(x)
            torch._dynamo.graph_break()
        return x

    fast = compiled(forward)
    fast(torch.randn(2, 4))
    assert sorted(lengths(pcr_fx.report())) == [10, 11, 12]
    assert "in a loop" in pcr_fx.report().outside[0]
    fast(torch.randn(5, 4))
    assert sorted(lengths(pcr_fx.report())) == [10, 11, 12]


def test_the_recompile_limit_is_told_with_the_reason() -> None:
    def forward(x: Tensor) -> Tensor:
        h = torch.zeros_like(x[0])
        for step in x:
            h = torch.tanh(h + step)
        return h

    with torch._dynamo.config.patch(recompile_limit=2):
        fast = compiled(forward)
        for length in range(20, 25):
            fast(torch.randn(length, 2))
    told = pcr_fx.report().outside[0]
    assert "recompile_limit = 2" in told and "in eager" in told and "size mismatch" in told


def test_what_dynamo_leaves_out_as_a_whole_is_told(caplog: pytest.LogCaptureFixture) -> None:
    compiled(plain_mlp(10))(torch.randn(2, 4))
    assert lengths(pcr_fx.report()) == [10]
    with caplog.at_level(logging.WARNING, logger="pcr_fx"):
        compiled(nn.LSTM(3, 4))(torch.randn(9, 2, 3))
    report = pcr_fx.report()
    assert not report.chains and "NO CHAIN FOUND in 0 ops" in str(report)
    assert "LSTM" in report.outside[0] and "allow_rnn" in report.outside[0]
    assert "LSTM" in caplog.text


def test_a_training_step_is_told_of_its_model_alone() -> None:
    model = plain_mlp(10)
    optimiser = torch.optim.Adam(model.parameters())

    def step(x: Tensor) -> None:
        optimiser.zero_grad()
        model(x).square().sum().backward()
        optimiser.step()

    compiled(step)(torch.randn(2, 4))
    report = pcr_fx.report()
    assert lengths(report) == [10] and report.nodes < 40


def test_what_has_no_graph_is_told_after_a_reset() -> None:
    compiled(plain_mlp(10))(torch.randn(2, 4))
    torch._dynamo.reset()
    compiled(nn.GRU(3, 4))(torch.randn(9, 2, 3))
    assert not pcr_fx.report().chains and "GRU" in pcr_fx.report().outside[0]


def test_a_failing_call_outside_of_dynamo_is_none_of_its_reasons() -> None:
    """A compilation within an `except` block meets an error that is not Dynamo's, and not its own."""
    try:
        raise torch._dynamo.exc.Unsupported("of another")
    except torch._dynamo.exc.Unsupported:
        compiled(plain_mlp(10))(torch.randn(2, 4))
    assert not pcr_fx.report().outside


def test_graphs_that_a_failing_inner_backend_got_are_none_of_a_report() -> None:
    def fails(graph: object, inputs: object) -> None:
        raise RuntimeError("no such machine")

    x = torch.randn(2, 3)
    model = nn.Sequential(plain_mlp(8, width=3), nn.Linear(3, 1))
    with torch._dynamo.config.patch(suppress_errors=True):
        assert torch.equal(compiled(model, inner_backend=fails)(x), model(x))
    report = pcr_fx.report()
    assert not lengths(report)
    assert any("RuntimeError: no such machine" in words for words in report.outside)


def test_near_misses_stand_in_order_of_length() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for index in range(12):
                x = torch.tanh(x)[: 40 - index]
            for _ in range(3):
                x = torch.sin(x) * torch.cos(x)
            return x

    found = pcr_fx.transform(Model(), example_inputs=torch.randn(40)).report.rejected
    assert [miss.length for miss in found] == sorted((miss.length for miss in found), reverse=True)
