"""Functions with derivatives of their own within blocks: their backward is what is computed, by any solver and either way in."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pcr_fx

LENGTH = 12


class Spike(torch.autograd.Function):
    """A step whose gradient is that of something smooth."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return g / (1 + 10 * v.abs()) ** 2


class Rounded(torch.autograd.Function):
    """Straight through, with a number, and nothing saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: float) -> Tensor:
        return torch.round(x * steps) / steps

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


class Scaled(torch.autograd.Function):
    """Two inputs, an intermediate that is saved, what the context keeps, and a wrong gradient that shows which is used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, factor: float) -> Tensor:
        t = torch.tanh(x * p)
        ctx.save_for_backward(t, p)
        ctx.factor = factor
        return t * factor

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        t, p = ctx.saved_tensors
        return g * (1 - t) * p * ctx.factor, (g * t).sum(0), None


class TwoResults(torch.autograd.Function):
    """Of which one is marked as having no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        sign = torch.sign(x)
        ctx.mark_non_differentiable(sign)
        ctx.save_for_backward(x)
        return x * x, sign

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * g * x


class NewStyle(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.sin(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * torch.cos(2 * ctx.saved_tensors[0])


class InContainers(torch.autograd.Function):
    """Keeps what its backward needs as attributes of the context, in containers of Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor) -> Tensor:
        ctx.pair, ctx.named, ctx.factor = [torch.sin(x), p], {"x": x * x}, 3.0
        return torch.tanh(x) * p

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        s, p = ctx.pair
        by_x = ctx.factor * g * s * p if ctx.needs_input_grad[0] else None
        return by_x, (g * ctx.named["x"]).sum(0) if ctx.needs_input_grad[1] else None


class InPlace(torch.autograd.Function):
    """Writes into what it makes itself, forward and backward, as libraries of spiking neurons do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x * x).add_(1.0).sqrt_()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return g / (3.0 * x).pow_(2).add_(1.0)


# As networks of spiking neurons have it.
spike = Spike.apply


def two_results(x: Tensor, p: Tensor) -> Tensor:
    square, sign = TwoResults.apply(x)
    return torch.tanh(square * p + 0.1 * sign)


STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a surrogate": lambda x, p: 0.9 * x * (1 - Spike.apply(x - 0.5)) + p,
    "straight through": lambda x, p: torch.tanh(Rounded.apply(x * p, 8.0)),
    "two inputs": lambda x, p: x + 0.1 * Scaled.apply(x, p, 0.5),
    "two results": two_results,
    "two functions": lambda x, p: torch.tanh(p * Spike.apply(Rounded.apply(x, 4.0)) + x),
    "bound beforehand": lambda x, p: 0.9 * x * (1 - spike(x - 0.5)) + p,
    "written in place": lambda x, p: torch.tanh(p * InPlace.apply(x)),
    "kept in containers": lambda x, p: x + 0.1 * InContainers.apply(x, p),
    "with a context set apart": lambda x, p: NewStyle.apply(x * p),
}


class Model(nn.Module):
    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.step = step
        draw = torch.Generator().manual_seed(0)
        self.p = nn.ParameterList(0.4 + 0.5 * torch.rand(4, generator=draw, dtype=torch.float64) for _ in range(LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        for p in self.p:
            x = self.step(x, p)
        return x


def gradients(model: Any, parameters: list[Tensor], x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad((weights * y).sum(), [x, *parameters])]


def example(batch: int = 3) -> Tensor:
    return torch.randn(batch, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("way", ["transform", "compile"])
@pytest.mark.parametrize("name", STEPS)
def test_the_backward_is_the_functions_own(name: str, way: str, kernel_cache: Any) -> None:
    model = Model(STEPS[name])
    if way == "transform":
        fast: Any = pcr_fx.transform(model, example(), options={"planning": "estimated"})
    else:
        torch._dynamo.reset()
        fast = torch.compile(model, backend="deeppcr", options={"inner_backend": "eager", "planning": "estimated"})
    expected = gradients(model, list(model.parameters()), example())
    torch.testing.assert_close(gradients(fast, list(model.parameters()), example()), expected, rtol=1e-12, atol=1e-12)
    report = pcr_fx.report(fast) if way == "transform" else pcr_fx.report()
    (chain,) = report.to_dict()["chains"]
    assert chain["length"] == LENGTH
    assert chain["native_forward"] and chain["native_backward"], str(report)


@pytest.mark.parametrize("solver", ["newton", "sequential"])
@pytest.mark.parametrize("name", ["two inputs", "two results", "with a context set apart"])
def test_by_other_solvers(name: str, solver: str) -> None:
    model = Model(STEPS[name])
    fast = torch.compile(
        model, backend="deeppcr", options={"inner_backend": "eager", "solver": solver, "kernels": False}
    )
    torch._dynamo.reset()
    parameters = list(model.parameters())
    for x in (example(), example(5)):
        wanted = gradients(model, parameters, x)
        torch.testing.assert_close(gradients(fast, parameters, x), wanted, rtol=1e-9, atol=1e-9)


def test_a_function_that_changes_is_read_anew() -> None:
    class Slope(torch.autograd.Function):
        slope = 2.0

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return torch.tanh(x)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * Slope.slope

    model = Model(lambda x, p: Slope.apply(x * p))
    fast = pcr_fx.transform(model, example(), options={"solver": "sequential", "kernels": False})
    parameters = list(model.parameters())
    for slope in (2.0, 0.5):
        Slope.slope = slope
        wanted = gradients(model, parameters, example())
        torch.testing.assert_close(gradients(fast, parameters, example()), wanted, rtol=1e-12, atol=1e-12)


def test_a_backward_that_draws_is_left_alone() -> None:
    class Thinned(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return torch.tanh(x)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * torch.bernoulli(torch.full_like(g, 0.5))

    model = Model(lambda x, p: Thinned.apply(x * p))
    fast = pcr_fx.transform(model, example())
    results = []
    for either in (model, fast):
        torch.manual_seed(0)
        results.append(gradients(either, list(model.parameters()), example()))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert "random op" in str(fast.report), str(fast.report)


def test_functions_that_differ_in_their_backward_alone() -> None:
    class Other(Spike):
        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 0.5 * g

    for function in (Spike, Other):
        model = Model(lambda x, p, function=function: torch.tanh(x * p + function.apply(x)))  # type: ignore[misc]
        fast = pcr_fx.transform(model, example(), options={"solver": "sequential", "kernels": False})
        parameters = list(model.parameters())
        wanted = gradients(model, parameters, example())
        torch.testing.assert_close(gradients(fast, parameters, example()), wanted, rtol=1e-12, atol=1e-12)


class Partly(nn.Module):
    """Blocks of which a part may lie in `no_grad`: the forward is the same, and the gradients are not."""

    def __init__(self, switch: Callable[[], Any]) -> None:
        super().__init__()
        self.switch = switch
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(12))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for layer in self.layers:
            with self.switch():
                y = 0.5 * torch.sin(x)
            x = torch.tanh(layer(x)) + y
            outputs.append(x.sum(-1) * y[:, 0])
        return x, torch.stack(outputs)


@pytest.mark.parametrize("solver", ["sequential", "newton"])
def test_blocks_that_differ_in_a_mode_alone_are_not_taken_for_each_other(solver: str) -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    kept = []  # what is known of the first one is known when the second is made
    for switch in (contextlib.nullcontext, torch.no_grad, contextlib.nullcontext):
        torch.manual_seed(0)
        model = Partly(switch).double()
        fast = pcr_fx.transform(model, x, {"solver": solver, "kernels": False})
        kept.append(fast)
        for results in (0, 1):
            got, expected = (
                torch.autograd.grad(run(x)[results].sum(), [x, *model.parameters()]) for run in (fast, model)
            )
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_a_first_call_without_gradients_says_nothing_of_those_of_a_transformed_step() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight
            for _ in range(9):
                weight = weight - 0.1 * torch.func.grad(lambda w: (x @ w).square().mean())(weight)
            return weight.sum()

    torch._dynamo.reset()
    model, x = Inner(), torch.randn(6, 4, dtype=torch.float64)
    fast = torch.compile(model, backend="deeppcr", options={"kernels": False, "inner_backend": "eager"})
    with torch.no_grad():
        fast(x)
    got, expected = (torch.autograd.grad(run(x), model.weight)[0] for run in (fast, model))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert [chain["length"] for chain in pcr_fx.report().to_dict()["chains"]] == [9]
