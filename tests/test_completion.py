"""Last blocks of which the model does not compute what nobody reads: they are blocks of the chain all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comparison import relative_error
from torch import Tensor, nn

import pcr_fx

STEPS = 12
Step = Callable[[Any, Tensor, Tensor], tuple[Tensor, Any]]


class Loop(nn.Module):
    """`step(module, state, x) -> (state, given)`, of which only what is given away is returned."""

    def __init__(self, step: Step, inputs: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.step, self.inputs = step, inputs
        self.rate = nn.Parameter(torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64))
        self.weights = nn.ParameterList([torch.randn(3, dtype=torch.float64) for _ in range(STEPS)])

    def forward(self, state: Tensor, xs: Tensor) -> Tensor:
        given = []
        for t, x in enumerate(self.inputs(xs)):
            state, one = self.step(self, state, x if self.step is not own_weights else x * self.weights[t])
            given.append(one)
        return torch.stack(given, 1)


def entries(xs: Tensor) -> list[Tensor]:
    return [xs[t] for t in range(STEPS)]


def reversed_columns(xs: Tensor) -> list[Tensor]:
    return [xs.transpose(0, 1)[:, t] for t in reversed(range(STEPS))]


def one_by_one(xs: Tensor) -> Iterator[Tensor]:
    """Each when its step begins."""
    return (xs[t] for t in range(STEPS))


def unbound(xs: Tensor) -> Any:
    return xs.unbind(0)


def spikes(m: Any, v: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    """Each input is read, the potential behind the last spike is not."""
    v = 0.9 * v + x
    soft = torch.sigmoid(4 * (v - 0.5))
    fired = (v > 0.5).to(v.dtype) - soft.detach() + soft
    return v - fired * m.rate, fired


def fluxes(m: Any, store: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    """The last input is not read at all."""
    flow, leak = m.rate[1] * torch.relu(store - 0.1), m.rate[2] * store.abs()
    return store + 0.1 * x - flow - leak, flow * leak


def biquad(m: Any, states: Any, x: Tensor) -> tuple[Any, Any]:
    """The last block but one lacks its second state, and the last lacks all but a fifth of its ops."""
    first, second = states if isinstance(states, tuple) else (states, states)
    y = m.rate[0] * x + first
    return (m.rate[1] * x + m.rate[2] * y + second, m.rate[2] * x + m.rate[0] * y), y


def own_weights(m: Any, h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    """Nor is the last of the parameters that the blocks have of their own."""
    return torch.tanh(h) + x, h.square() * m.rate


def multiplied(m: Any, h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    """What reads the last input multiplies it by a parameter, whose gradient would see it."""
    return h.sin() + m.rate * x, torch.tanh(h) * m.rate


def rooted(m: Any, h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    """The derivative of what is unread may be infinite."""
    return (h.abs() * m.rate).sqrt() + x, h.cos() * m.rate + x


def run(model: nn.Module, way_in: str) -> Any:
    torch._dynamo.reset()
    options = {"solver": "sequential", "kernels": False}
    if way_in == "compile":
        return torch.compile(model, backend="deeppcr", options=options)
    given = torch.zeros(2, 3).double(), torch.zeros(STEPS, 2, 3).double()
    return pcr_fx.transform(model, given, options)


def gradients(run: Any, model: nn.Module, state: Tensor, xs: Tensor) -> list[Any]:
    state, xs = state.clone().requires_grad_(), xs.clone().requires_grad_()
    output = run(state, xs)
    sources = [state, xs, *model.parameters()]
    return [output, *torch.autograd.grad(output.square().sum(), sources, allow_unused=True)]


def check(model: nn.Module, way_in: str, length: int, last: float = 0.0) -> None:
    torch.manual_seed(1)
    state, xs = torch.rand(2, 3).double(), torch.randn(STEPS, 2, 3).double()
    if last:
        xs[-1] = last
    fast = run(model, way_in)
    for got, expected in zip(gradients(fast, model, state, xs), gradients(model, model, state, xs), strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            assert torch.equal(got.isnan(), expected.isnan())
            assert relative_error(got.nan_to_num(), expected.nan_to_num()) < 1e-13
    report = fast.report if way_in == "transform" else pcr_fx.report()
    assert [entry.chain.length for entry in report.chains] == [length], report


@pytest.mark.parametrize("way_in", ["transform", "compile"])
@pytest.mark.parametrize("inputs", [entries, reversed_columns, unbound])
@pytest.mark.parametrize("step", [spikes, fluxes])
def test_the_last_block_is_completed(step: Step, inputs: Callable[[Tensor], Any], way_in: str) -> None:
    check(Loop(step, inputs), way_in, STEPS)


@pytest.mark.parametrize("way_in", ["transform", "compile"])
def test_the_last_two_blocks_are_completed(way_in: str) -> None:
    check(Loop(biquad, one_by_one), way_in, STEPS)


@pytest.mark.parametrize("last", [float("nan"), float("inf")])
def test_a_gradient_does_not_see_what_is_unread(last: float) -> None:
    """Where a step reads it linearly it is taken along; where a parameter is multiplied by it, it stays outside."""
    check(Loop(fluxes, entries), "transform", STEPS, last)
    check(Loop(multiplied, entries), "transform", STEPS - 1, last)


def test_operands_that_only_the_unread_depends_on() -> None:
    check(Loop(own_weights, entries), "transform", STEPS - 1)


def test_infinite_derivatives_of_the_unread() -> None:
    check(Loop(rooted, entries), "transform", STEPS - 1)


def test_operands_are_still_handed_over_whole() -> None:
    """The input of the last step is the tensor's last entry, so that no list is stacked."""
    model = Loop(fluxes, entries)
    fast = run(model, "transform")
    fast(torch.zeros(2, 3).double(), torch.zeros(STEPS, 2, 3).double())
    code = fast._pcr_variants[0].run.code
    assert "stack_operands" not in code, code


class Given(nn.Module):
    """The last of its steps, whose number is fixed, takes no input."""

    def forward(self, state: Tensor, xs: Tensor) -> Tensor:
        given = []
        for t in range(STEPS):
            given.append(torch.tanh(state).sin().cos() * 0.5)
            if t < STEPS - 1:
                state = state + 0.1 * xs[t] - 0.2 * state
        return torch.stack(given, 1)


@pytest.mark.parametrize("way_in", ["transform", "compile"])
def test_an_input_that_the_model_does_not_take_need_not_be_there(way_in: str) -> None:
    model, state = Given(), torch.rand(2, 3).double()
    fast = run(model, way_in)
    for steps in (STEPS, STEPS - 1, STEPS + 1):
        xs = torch.randn(steps, 2, 3).double()
        torch.testing.assert_close(fast(state, xs), model(state, xs), rtol=1e-13, atol=0)
