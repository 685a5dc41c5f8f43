"""Operands that a tensor is cut into, a part for each block, are handed over as that tensor."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from comparison import relative_error
from torch import Tensor, nn

import pcr_fx
from pcr_fx import Options

LENGTH = 12
OPTIONS = Options(solver="sequential", min_length=2, planning="estimated")


def ops_around_chains(run: Callable[[], Any]) -> list[str]:
    """What is called beside the chains."""
    with torch.profiler.profile() as profile:
        run()

    def is_in_a_chain(event: Any) -> bool:
        return event is not None and (event.name.startswith("pcr_fx") or is_in_a_chain(event.cpu_parent))

    events = profile.events()
    assert any(map(is_in_a_chain, events))
    return [event.name.removeprefix("aten::") for event in events if not is_in_a_chain(event)]


class Loop(nn.Module):
    """`state = tanh(state + part(inputs, t))` for each `t`."""

    def __init__(self, part: Callable[[Tensor, int], Tensor], times: list[int]) -> None:
        super().__init__()
        self.part, self.times = part, times

    def forward(self, state: Tensor, inputs: Tensor) -> Tensor:
        for t in self.times:
            state = torch.tanh(state + self.part(inputs, t))
        return state


UP, DOWN = list(range(LENGTH)), list(range(LENGTH))[::-1]
CUTS = {
    "first dimension": (lambda x, t: x[t], UP),
    "backwards": (lambda x, t: x[t], DOWN),
    "every other": (lambda x, t: x[t], UP[1::2]),
    "every other backwards": (lambda x, t: x[t], DOWN[::2]),
    "second dimension": (lambda x, t: x[:, t], UP),
    "third dimension backwards": (lambda x, t: x[:, :, t], DOWN),
    "select": (lambda x, t: x.select(1, t), UP),
    "unbind": (lambda x, t: x.unbind(1)[t], UP),
    "some of the middle": (lambda x, t: x[t], UP[3:8]),
    "a part of each": (lambda x, t: x[t, 0], UP),
    "a number of each, backwards": (lambda x, t: x[2, t, 1], DOWN),
    "a row of each": (lambda x, t: x[1, :, t], UP[::2]),
}
NO_CUTS = {
    "no order": (lambda x, t: x[t], [3, 1, 4, 0, 5, 9]),
    "negative": (lambda x, t: x[-1 - t], UP),
    "a diagonal": (lambda x, t: x[t, t], UP),
    "a range of each": (lambda x, t: x[t, 0:12], UP),
    "ranges": (lambda x, t: x[t : t + 1].squeeze(0), UP),
}


@pytest.mark.parametrize("name", [*CUTS, *NO_CUTS])
@pytest.mark.parametrize("compiles", [False, True])
def test_parts_of_a_tensor(name: str, compiles: bool) -> None:
    torch.manual_seed(0)
    model = Loop(*{**CUTS, **NO_CUTS}[name])
    shape = (LENGTH, LENGTH, LENGTH)
    state, inputs = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in (shape[1:], shape))
    if compiles:
        torch._dynamo.reset()
        options = {**OPTIONS.__dict__, "inner_backend": "eager"}
        fast = torch.compile(model, backend="deeppcr", options=options)
    else:
        fast = pcr_fx.transform(model, (state, inputs), OPTIONS)
    got, expected = fast(state, inputs), model(state, inputs)
    assert relative_error(got, expected) < 1e-14
    weights = torch.randn_like(expected)
    pairs = zip(*(torch.autograd.grad(out, (state, inputs), weights) for out in (got, expected)), strict=True)
    assert all(relative_error(ours, theirs) < 1e-14 for ours, theirs in pairs)


@pytest.mark.parametrize("name", CUTS)
def test_parts_are_not_cut_out_one_by_one(name: str) -> None:
    model, state, inputs = Loop(*CUTS[name]), torch.randn(LENGTH, LENGTH), torch.randn(LENGTH, LENGTH, LENGTH)
    fast = pcr_fx.transform(model, (state, inputs), OPTIONS)
    fast(state, inputs)
    names = ops_around_chains(lambda: fast(state, inputs))
    assert not {"stack", "unbind"} & set(names)
    assert names.count("select") <= 3  # of what all blocks have alike, and the last state of the trajectory


def test_blocks_that_need_their_parts_in_one_piece() -> None:
    """Of a batch-first sequence each step is a view with gaps; the blocks were read on one without."""
    torch.manual_seed(0)
    cell, inputs = nn.LSTMCell(3, 4).double(), torch.randn(2, LENGTH, 3, dtype=torch.float64)

    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, x: Tensor) -> Tensor:
            state = x.new_zeros(2, 4), x.new_zeros(2, 4)
            for t in range(LENGTH):
                state = self.cell(x[:, t], state)
            return state[0]

    model = Unrolled()
    for solver in ("newton", "sequential"):
        fast = pcr_fx.transform(model, inputs, {"solver": solver, "min_length": 2, "kernels": False})
        torch.testing.assert_close(fast(inputs), model(inputs))
        parameters = list(model.parameters())
        ours, theirs = (torch.autograd.grad(net(inputs).sum(), parameters) for net in (fast, model))
        assert all(relative_error(a, b) < 1e-12 for a, b in zip(ours, theirs, strict=True))


class Schedule(NamedTuple):
    scale: Tensor
    shift: Tensor


class Scheduled(nn.Module):
    def forward(self, state: Tensor, steps: Schedule, others: tuple[Tensor, ...]) -> Tensor:
        for t in reversed(range(LENGTH)):
            state = torch.sin(state * steps.scale[t] + steps.shift[t]) + others[1][t]
        return state


def test_items_of_a_tuple_are_read_once() -> None:
    model, state = Scheduled(), torch.randn(4)
    steps, others = Schedule(torch.randn(LENGTH), torch.randn(LENGTH)), (torch.randn(3), torch.randn(LENGTH))
    fast = pcr_fx.transform(model, (state, steps, others), OPTIONS)
    torch.testing.assert_close(fast(state, steps, others), model(state, steps, others))
    names = ops_around_chains(lambda: fast(state, steps, others))
    assert "stack" not in names and names.count("select") <= 1


class WithProperty(NamedTuple):
    scale: Tensor

    @property
    def doubled(self) -> Tensor:
        return 2 * self.scale


class ReadsProperty(nn.Module):
    def forward(self, state: Tensor, steps: WithProperty) -> tuple[Tensor, ...]:
        before = steps.doubled
        steps.scale.mul_(2)
        for _ in range(LENGTH):
            state = torch.sin(state + steps.doubled)
        return state, before, steps.doubled


def test_a_property_of_a_tuple_is_computed_where_it_is_read() -> None:
    model, state = ReadsProperty(), torch.randn(3)
    fast = pcr_fx.transform(model, (state, WithProperty(torch.ones(3))), OPTIONS)
    for ours, theirs in zip(
        fast(state, WithProperty(torch.ones(3))), model(state, WithProperty(torch.ones(3))), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@torch.library.custom_op("pcr_fx_tests::select", mutates_args=())
def custom_select(x: Tensor, dim: int, index: int) -> Tensor:
    return 2 * x.select(dim, index)


@custom_select.register_fake
def _(x: Tensor, dim: int, index: int) -> Tensor:
    return torch.empty_like(x.select(dim, index))


def test_an_op_that_bears_the_name_of_one_of_pytorchs() -> None:
    model = Loop(lambda x, t: torch.ops.pcr_fx_tests.select(x, 0, t), UP)
    state, inputs = torch.randn(4), torch.randn(LENGTH, 4)
    fast = pcr_fx.transform(model, (state, inputs), OPTIONS)
    torch.testing.assert_close(fast(state, inputs), model(state, inputs))


def test_parts_that_were_cut_without_gradients_have_none() -> None:
    def loop(state: Tensor, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            parts = [inputs[:, t] for t in range(LENGTH)]
        for part in parts:
            state = torch.sin(state + part)
        return state.sum() + inputs.sum()

    torch._dynamo.reset()
    fast = torch.compile(loop, backend="deeppcr", options={**OPTIONS.__dict__, "inner_backend": "eager"})
    inputs = torch.randn(3, LENGTH, requires_grad=True)
    (gradient,) = torch.autograd.grad(fast(torch.randn(3, requires_grad=True), inputs), inputs)
    assert (gradient == 1).all()


def test_an_input_may_be_overwritten_before_the_backward() -> None:
    model, state = Loop(lambda x, t: x.select(0, t), UP), torch.randn(4, requires_grad=True)
    inputs = torch.randn(LENGTH, 4)
    fast = pcr_fx.transform(model, (state, inputs), OPTIONS)
    (expected,) = torch.autograd.grad(model(state, inputs).sum(), state)
    out = fast(state, inputs)
    inputs.normal_()
    torch.testing.assert_close(torch.autograd.grad(out.sum(), state)[0], expected)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_parts_of_what_another_chain_returned(inner: str) -> None:
    def loops(state: Tensor, other: Tensor, inputs: Tensor) -> Tensor:
        for t in range(LENGTH):
            state = torch.tanh(state + inputs[:, t])
        for t in range(LENGTH):
            other = torch.sin(other * state[t])
        return other

    torch._dynamo.reset()
    fast = torch.compile(loops, backend="deeppcr", options={**OPTIONS.__dict__, "inner_backend": inner})
    tensors = [torch.randn(*shape, requires_grad=True) for shape in ((LENGTH, 3), (3,), (LENGTH, LENGTH, 3))]
    ours, theirs = fast(*tensors), loops(*tensors)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(out.sum(), tensors) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


class ReturnsParts(nn.Module):
    def forward(self, state: Tensor, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        parts = [inputs[:, t] for t in range(LENGTH)]
        for part in parts:
            state = torch.tanh(state + part)
        return state, parts


def test_parts_that_are_returned_have_gradients() -> None:
    model, state, inputs = ReturnsParts(), torch.randn(3), torch.randn(3, LENGTH, requires_grad=True)
    fast = pcr_fx.transform(model, (state, inputs), OPTIONS)
    gradients = []
    for net in (fast, model):
        out, parts = net(state, inputs)
        gradients.append(torch.stack(torch.autograd.grad(out.sum(), parts)))
    torch.testing.assert_close(*gradients)


def test_unbind_by_keywords() -> None:
    model = Loop(lambda x, t: torch.unbind(input=x, dim=1)[t], UP)
    state, inputs = torch.randn(LENGTH, 4), torch.randn(LENGTH, LENGTH, 4)
    fast = pcr_fx.transform(model, (state, inputs), OPTIONS)
    torch.testing.assert_close(fast(state, inputs), model(state, inputs))


@pytest.mark.parametrize("which", [0, 1])
def test_tensors_that_are_negative_by_a_flag(which: int) -> None:
    """Native code reads memory, which holds them without their sign."""
    model = Loop(lambda x, t: x[:, t], UP)
    plain = [torch.randn(4, 3, dtype=torch.float64), torch.randn(4, LENGTH, 3, dtype=torch.float64)]
    fast = pcr_fx.transform(model, tuple(plain), OPTIONS)
    tensors = [torch._neg_view(tensor) if index == which else tensor for index, tensor in enumerate(plain)]
    assert relative_error(fast(*tensors), model(*tensors)) < 1e-14


@pytest.mark.parametrize("part, times", [(lambda x, t: x[t], UP), (lambda x, t: x[:, t], DOWN)])
def test_fewer_inputs_than_the_model_takes_are_told_of(part: Callable[[Tensor, int], Tensor], times: list[int]) -> None:
    model, state = Loop(part, times), torch.randn(LENGTH, 4)
    fast = pcr_fx.transform(model, (state, torch.randn(LENGTH, LENGTH, 4)), OPTIONS)
    fewer = torch.randn(LENGTH, LENGTH, 4)[:, :-1] if times is DOWN else torch.randn(LENGTH - 1, LENGTH, 4)
    for run in (model, fast):
        with pytest.raises(IndexError, match=f"index {LENGTH - 1} is out of bounds for dimension"):
            run(state, fewer)
