"""`PCR_FX_DISABLE=1`: all ways in run what was written, and say so."""

import copy
import io

import pytest
import torch
from models import ResidualNet
from torch import Tensor, nn

import pcr_fx
from pcr_fx.node import SolveNode


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCR_FX_DISABLE", "1")

    def refuse(*_: object) -> None:
        raise AssertionError("a chain runs, although everything is switched off")

    monkeypatch.setattr(SolveNode, "_run", refuse)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return ResidualNet(9)


@pytest.mark.usefixtures("off")
def test_compile_hands_the_whole_graph_on(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 3)
    compiled = torch.compile(model, backend="deeppcr", options={"inner_backend": "eager"})
    assert torch.equal(compiled(x), model(x))
    report = pcr_fx.report()
    assert report.is_off and not report.chains and report.to_dict()["is_off"]
    assert "SWITCHED OFF. PCR_FX_DISABLE=1" in str(report) and "PCR_FX_DISABLE=1" in caplog.text
    assert pcr_fx.explain(model, x).is_off


@pytest.mark.usefixtures("off")
def test_transform_reads_nothing_and_may_branch(model: nn.Module) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if x.sum() > 0 else -self.net(x)

    branching = Branching()
    fast = pcr_fx.transform(branching)
    for x in (torch.ones(2, 3), -torch.ones(5, 3)):
        assert torch.equal(fast(x), branching(x))
    assert pcr_fx.report(fast).is_off
    fast.eval()
    assert torch.equal(fast(x), branching(x)) and torch.equal(copy.deepcopy(fast)(x), branching(x))


@pytest.mark.usefixtures("off")
def test_packed_parameters_stay_apart_and_the_optimizer_follows(model: nn.Module) -> None:
    x, before = torch.randn(4, 3), copy.deepcopy(model.state_dict())
    plain = copy.deepcopy(model)
    other = torch.optim.SGD(plain.parameters(), lr=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fast = pcr_fx.transform(model, x, pack_parameters=True, optimizer=optimizer)
    for trained, its in ((fast, optimizer), (plain, other)):
        trained(x).square().sum().backward()
        its.step()
    assert list(fast.state_dict()) == list(before)
    assert all(torch.equal(one, other) for one, other in zip(fast.parameters(), plain.parameters(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_was_transformed_before_goes_on(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3)
    fast = pcr_fx.transform(model, x, {"solver": "sequential", "kernels": False})
    monkeypatch.setenv("PCR_FX_DISABLE", "1")
    assert len(pcr_fx.report(fast).chains) == 1
    assert pcr_fx.report(pcr_fx.transform(fast, x)).is_off
    torch.testing.assert_close(fast(x), model(x))


def step(state: Tensor, operand: Tensor, shared: Tensor) -> Tensor:
    return torch.tanh(state * operand) + shared


@pytest.mark.usefixtures("off")
def test_a_chain_is_a_plain_loop() -> None:
    x0, operands, shared = (torch.randn(3, requires_grad=True), torch.randn(5, 3, requires_grad=True), torch.randn(3))
    solution = pcr_fx.solve_chain(step, x0, operands, shared=shared)
    state, states = x0, []
    for operand in operands:
        state = step(state, operand, shared)
        states.append(state)
    assert torch.equal(solution.trajectory, torch.stack(states)) and torch.equal(solution.final, state)
    assert solution.stats.outcome is pcr_fx.Outcome.SEQUENTIAL
    ours, theirs = (torch.autograd.grad(one.sum(), (x0, operands)) for one in (solution.final, state))
    assert all(map(torch.equal, ours, theirs))
    with pytest.raises(pcr_fx.BodyError, match=r"shape and dtype of x0, \[3\] torch.float32, got \[1\]"):
        pcr_fx.solve_chain(lambda state, *_: state[:1], x0, operands)


@pytest.mark.usefixtures("off")
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_scan_is_a_plain_loop(is_compiled: bool) -> None:
    torch._dynamo.reset()

    def run(x0: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
        return pcr_fx.scan(lambda state, x: (torch.tanh(state + x), state.sum()), x0, xs)

    x0, xs = torch.randn(3), torch.randn(5, 3)
    state, ys = x0, []
    for x in xs:
        ys.append(state.sum())
        state = torch.tanh(state + x)
    final, outputs = (torch.compile(run, backend="eager", fullgraph=True) if is_compiled else run)(x0, xs)
    assert torch.equal(final, state) and torch.equal(outputs, torch.stack(ys))
    final, outputs = run(x0, xs[:0])
    assert torch.equal(final, x0) and outputs.shape == (0,)


def test_an_exported_chain_runs_in_pytorchs_ops(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3)
    program = torch.export.export(pcr_fx.transform(model, x, {"kernels": False, "solver": "sequential"}), (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    monkeypatch.setenv("PCR_FX_DISABLE", "1")
    monkeypatch.setattr(SolveNode, "_run", None)
    run = torch.export.load(file).module()
    assert any("pcr_fx.chain" in str(node.target) for node in run.graph.nodes)
    torch.testing.assert_close(run(x), model(x))


def test_only_1_switches_off(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCR_FX_DISABLE", "0")
    assert len(pcr_fx.transform(model, torch.randn(2, 3), {"kernels": False}).report.chains) == 1
