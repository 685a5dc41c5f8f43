"""Blocks that switch autocast or gradients, or transform functions: the chain is found, and computes what the model does."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pcr_fx

LENGTH = 10
OPTIONS = {"inner_backend": "eager", "solver": "sequential", "kernels": False}


class Model(nn.Module):
    def __init__(self, step: Callable[..., Any], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step = step
        self.linears = nn.ModuleList(nn.Linear(4, 4) for _ in range(LENGTH))
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(LENGTH))
        self.energy = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 1))
        self.to(dtype)

    def forward(self, x: Tensor) -> Any:
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = self.step(self, x, linear, norm)
        return x


def norm_without(_: Model, x: Tensor, linear: nn.Module, norm: nn.Module) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        y = norm(x)
    return x + torch.tanh(linear(y))


def linear_with(_: Model, x: Tensor, linear: nn.Module, norm: nn.Module) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x)
    return x + torch.tanh(norm(y.to(x.dtype)))


def gate_without_gradients(_: Model, x: Tensor, linear: nn.Module, norm: nn.Module) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(norm(x))
    return x + torch.tanh(linear(x)) * gate


def with_gradients(_: Model, x: Tensor, linear: nn.Module, norm: nn.Module) -> Tensor:
    with torch.enable_grad():
        return x + torch.tanh(linear(x))


def cell_without_gradients(model: Model, x: Tensor, linear: nn.Module, norm: nn.Module) -> Tensor:
    """A fused op within."""
    with torch.no_grad():
        gate = F.prelu(norm(x), model.linears[0].bias[:1])
    return torch.tanh(linear(x)) * gate


def descent(model: Model, x: Tensor, linear: nn.Module, norm: nn.Module) -> Tensor:
    return x - 0.05 * torch.func.grad(lambda v: model.energy(v).sum())(x)


def descent_with_value(model: Model, x: Tensor, linear: nn.Module, norm: nn.Module) -> Tensor:
    slope, value = torch.func.grad_and_value(lambda v: model.energy(linear(v)).sum())(x)
    return x - 0.05 * slope + 0.01 * value


def descent_of_each_sample(model: Model, x: Tensor, linear: nn.Module, norm: nn.Module) -> Tensor:
    return x - 0.05 * torch.vmap(torch.func.grad(lambda v: model.energy(v).sum()))(x)


def of_a_slope(model: Model, x: Tensor, linear: nn.Module, norm: nn.Module) -> Tensor:
    slope = torch.func.grad(lambda v: model.energy(v).sum())
    return x - 0.05 * torch.func.grad(lambda u: slope(u).square().sum())(x)


def by_a_pullback(model: Model, x: Tensor, linear: nn.Module, norm: nn.Module) -> Tensor:
    y, pull = torch.func.vjp(model.energy, x)
    return x - 0.05 * pull(torch.ones_like(y))[0]


def with_noise(model: Model, x: Tensor, linear: nn.Module, norm: nn.Module) -> Tensor:
    return descent(model, x, linear, norm) + 0.1 * torch.randn_like(x)


def by_autograd(model: Model, x: Tensor, linear: nn.Module, norm: nn.Module) -> Tensor:
    (slope,) = torch.autograd.grad(model.energy(x).sum(), x, create_graph=True)
    return x - 0.05 * slope


class Adapted(Model):
    """The state is weights."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.linears[0].weight, self.linears[0].bias
        for _ in range(LENGTH):
            slopes = torch.func.grad(lambda w, b: F.linear(x, w, b).tanh().square().mean(), argnums=(0, 1))(
                weight, bias
            )
            weight, bias = weight - 0.1 * slopes[0], bias - 0.1 * slopes[1]
        return F.linear(x, weight, bias)


def gradients(run: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(0)
    y = run(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    inputs = [x, *model.parameters()]
    return [y, *torch.autograd.grad((weights * y).sum(), inputs, materialize_grads=True, allow_unused=True)]


def check(model: nn.Module, x: Tensor, length: int = LENGTH, tolerance: float = 1e-11) -> None:
    torch._dynamo.reset()
    fast = torch.compile(model, backend="deeppcr", options=OPTIONS)
    for batch in (3, 2)[: 2 if tolerance < 1e-6 else 1]:
        wanted = gradients(model, model, x[:batch])
        torch.testing.assert_close(gradients(fast, model, x[:batch]), wanted, rtol=tolerance, atol=tolerance)
        lengths = [chain["length"] for chain in pcr_fx.report().to_dict()["chains"]]
        assert lengths == ([length] if length else []) or batch == 2, str(pcr_fx.report())


def example() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "step",
    [
        norm_without,
        gate_without_gradients,
        with_gradients,
        cell_without_gradients,
        descent,
        descent_with_value,
        descent_of_each_sample,
        of_a_slope,
        by_a_pullback,
        with_noise,
    ],
)
def test_a_step(step: Callable[..., Any]) -> None:
    check(Model(step), example())


def test_a_gradient_that_breaks_the_graph() -> None:
    check(Model(by_autograd), example(), length=0)
    assert "torch.compile broke the model" in str(pcr_fx.report())


def test_weights_that_are_adapted() -> None:
    check(Adapted(norm_without), example())


def test_a_dtype_within_the_block() -> None:
    check(Model(linear_with, torch.float32), example().float(), tolerance=0.02)


@pytest.mark.parametrize("step", [norm_without, linear_with])
def test_under_autocast(step: Callable[..., Any]) -> None:
    """As exact as the model, or more so: chains are solved in float32."""
    model, x = Model(step, torch.float32), example().float()
    exact = Model(lambda m, x, linear, norm: step(m, x, linear, norm)).double()
    torch._dynamo.reset()
    fast = torch.compile(model, backend="deeppcr", options=OPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, own = fast(x), model(x)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", enabled=False))
        wanted = exact(x.double()) if step is norm_without else own.double()
    assert got.dtype == own.dtype
    assert (got - wanted).abs().max() <= (own - wanted).abs().max() + 0.1
    assert [chain["length"] for chain in pcr_fx.report().to_dict()["chains"]] == [LENGTH]


def test_a_chain_within_one_stretch_is_found_there() -> None:
    class Whole(Model):
        def forward(self, x: Tensor) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    check(Whole(norm_without, torch.float32), example().float(), tolerance=0.2)


def test_a_stretch_that_draws_stays_where_it_is() -> None:
    def noisy(_: Model, x: Tensor, linear: nn.Module, norm: nn.Module) -> Tensor:
        with torch.no_grad():
            kept = torch.bernoulli(torch.sigmoid(x))
        return torch.tanh(linear(x)) * kept

    check(Model(noisy), example(), length=0)


def check_transformed(model: nn.Module, x: Tensor, length: int = LENGTH, tolerance: float = 1e-11) -> None:
    fast = pcr_fx.transform(model, x, options={"solver": "sequential", "kernels": False})
    wanted = gradients(model, model, x)
    torch.testing.assert_close(gradients(fast, model, x), wanted, rtol=tolerance, atol=tolerance)
    assert [chain["length"] for chain in fast.report.to_dict()["chains"]] == [length], str(fast.report)


@pytest.mark.parametrize("step", [norm_without, gate_without_gradients, with_gradients, cell_without_gradients])
def test_a_step_that_is_transformed(step: Callable[..., Any]) -> None:
    check_transformed(Model(step), example())


def test_a_dtype_within_the_block_that_is_transformed() -> None:
    check_transformed(Model(linear_with, torch.float32), example().float(), tolerance=0.02)


def test_steps_without_gradients_and_one_with() -> None:
    class Fixed(Model):
        def forward(self, x: Tensor) -> Tensor:
            z, linear = torch.zeros_like(x), self.linears[0]
            with torch.no_grad():
                for _ in range(LENGTH):
                    z = torch.tanh(0.5 * linear(z) + x)
            return torch.tanh(0.5 * linear(z) + x)

    check_transformed(Fixed(norm_without), example())


def test_called_under_autocast_after_it_was_traced_without() -> None:
    model, x = Model(norm_without, torch.float32), example().float()
    fast = pcr_fx.transform(model, x, options={"solver": "sequential", "kernels": False})
    torch.testing.assert_close(fast(x), model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fast(x), model(x), rtol=0.2, atol=0.2)
    torch.testing.assert_close(fast(x), model(x))


def test_an_error_leaves_nothing_switched() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                return torch.tanh(x) + x[index]

    x, good = torch.randn(3, 4), torch.tensor([0, 1, 2])
    model = Failing()
    fast = pcr_fx.transform(model, (x, good))
    torch.testing.assert_close(fast(x, good), model(x, good))
    with pytest.raises(IndexError):
        fast(x, good + 5)
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_a_function_transform_that_is_transformed_is_refused() -> None:
    with pytest.raises(pcr_fx.CaptureError, match=r"torch.func.*torch.compile"):
        pcr_fx.transform(Model(descent), example())
