"""Chains on a CUDA GPU under what surrounds them there: graphs, streams, compilers. Skipped without one."""

import copy
from collections.abc import Callable

import pytest
import torch
from comparison import relative_error
from torch import Tensor, nn

import pcr_fx

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
LENGTH, WIDTH, SAMPLES = 150, 3, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.tanh(self.linear(x))


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(LENGTH))).cuda()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(SAMPLES, WIDTH, device="cuda")


def exact(model: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(model).double()(x.double())


def assert_near(got: Tensor, model: nn.Module, x: Tensor) -> None:
    assert relative_error(got.double(), exact(model, x)) < 2e-5


def warmed_up(function: Callable[[], object]) -> None:
    """As PyTorch asks before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)


def packed(model: nn.Module, x: Tensor, solver: str = "newton") -> nn.Module:
    return pcr_fx.transform(model, (x,), options={"solver": solver}, pack_parameters=True)


@pytest.mark.parametrize("solver", ["newton", "sequential"])
def test_a_captured_forward_sees_new_inputs_and_parameters(model: nn.Module, x: Tensor, solver: str) -> None:
    fast = packed(model, x, solver)
    with torch.no_grad():
        warmed_up(lambda: fast(x))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fast(x)
        x.copy_(torch.randn_like(x))
        for parameter in fast.parameters():
            parameter.mul_(0.5)
        for parameter in model.parameters():
            parameter.mul_(0.5)
        graph.replay()
        assert_near(out, model, x)


def test_a_captured_training_step(model: nn.Module, x: Tensor) -> None:
    fast = packed(model, x)
    parameters = [x.requires_grad_(), *fast.parameters()]

    def step() -> list[Tensor]:
        return list(torch.autograd.grad(fast(x).square().sum(), parameters))

    warmed_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    double = copy.deepcopy(model).double()
    inputs = [x.detach().double().requires_grad_(), *double.parameters()]
    d_x, *rest = torch.autograd.grad(double(inputs[0]).square().sum(), inputs)
    weights, biases = torch.stack(rest[::2]), torch.stack(rest[1::2])
    for ours, theirs in zip(got, [d_x, weights, biases], strict=True):
        assert relative_error(ours.double(), theirs) < 2e-5


def test_a_report_tells_of_replayed_solves(model: nn.Module, x: Tensor) -> None:
    fast = packed(model, x)
    with torch.no_grad():
        warmed_up(lambda: fast(x))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fast(x)
        (before,) = fast.report.to_dict()["chains"]
        x.fill_(float("nan"))
        graph.replay()
    (after,) = fast.report.to_dict()["chains"]
    assert before["iterations"] > 0 and before["fallbacks"] == 0
    assert after["fallbacks"] == 1


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled(model: nn.Module, x: Tensor, mode: str | None) -> None:
    """Several times, since CUDA graphs are warmed up, then recorded, then replayed."""
    compiled = torch.compile(
        model, backend="deeppcr", mode=mode, options={"solver": "newton"} if mode is None else None
    )
    for _ in range(4):
        x = torch.randn_like(x).requires_grad_()
        out = compiled(x)
        assert_near(out, model, x)
        (d_x,) = torch.autograd.grad(out.sum(), x)
        double = x.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(exact(model, double).sum(), double)
        assert relative_error(d_x.double(), expected) < 2e-5
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
    (chain,) = pcr_fx.report().to_dict()["chains"]
    assert chain["rewritten"] and chain["fallbacks"] == 0


def test_a_stream_of_the_caller(model: nn.Module, x: Tensor) -> None:
    """What the stream computes before is waited for: a kernel on another stream would read zeros."""
    fast, side = packed(model, x), torch.cuda.Stream()
    fast(x)
    late, slow = torch.zeros_like(x), torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(20):
            slow = slow @ slow / 64
        late.copy_(x)
        out = fast(late)
    side.synchronize()
    assert_near(out, model, x)


def test_parameters_updated_in_place(model: nn.Module, x: Tensor) -> None:
    fast = pcr_fx.transform(model, (x,), options={"solver": "newton"})
    fast(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert_near(fast(x), model, x)


def test_autocast(model: nn.Module, x: Tensor) -> None:
    fast = packed(model, x)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got, eager = fast(x), model(x)
    assert got.dtype == eager.dtype
    assert relative_error(got.double(), exact(model, x)) < 2e-2


def test_float64(model: nn.Module, x: Tensor) -> None:
    model, x = model.double(), x.double()
    assert relative_error(packed(model, x)(x), model(x)) < 1e-12


def test_a_copy(model: nn.Module, x: Tensor) -> None:
    fast = packed(model, x)
    fast(x)
    assert_near(copy.deepcopy(fast)(x), model, x)


def test_another_device_than_the_current_one(model: nn.Module, x: Tensor) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    moved, there = model.to("cuda:1"), x.to("cuda:1")
    assert_near(packed(moved, there)(there), moved, there)
