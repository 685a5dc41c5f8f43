"""Native code that writes outputs and whole states where they are to be, in the sweep that computes them, and its way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_outputs import SEQUENTIAL, STEPS, Loop, check, flux, gate, node_of, results
from torch import Tensor, nn

import pcr_fx
from pcr_fx.sweep import Sweep


def sweep_of(fast: Any) -> Sweep | None:
    """How the latest call in place went."""
    return node_of(fast)._sweeps.latest()


def given(batch: int, length: int, width: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(batch)
    return torch.randn(batch, width).double(), torch.randn(length, batch, width).double()


def several(m: Any, h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    """Outputs of four shapes and three dtypes, with parameters and an operand that no state needs."""
    gates = torch.sigmoid(x @ m.weight + h)
    new = gates * h + 0.3 * x
    return new, (gates * x.cos(), new.square().sum(-1) * m.rate, new > h, new.argmax(-1), m.out(new))


def separately(collected: list[Any]) -> Any:
    return [torch.stack(one, dim) for one, dim in zip(zip(*collected, strict=True), (1, 0, 1, 1, 0), strict=True)]


@pytest.mark.parametrize("batch", [1, 3, 11, 32])
@pytest.mark.parametrize("length", [8, 9])
def test_several_outputs(batch: int, length: int) -> None:
    fast = check(Loop(several, separately), SEQUENTIAL, given(batch, length))
    sweep = sweep_of(fast)
    assert sweep is not None and len(sweep.wholes) == 5


@pytest.mark.parametrize("name", ["readout", "carried_reads", "spike", "index"])
def test_each_step(name: str) -> None:
    assert sweep_of(check(Loop(STEPS[name]), SEQUENTIAL)) is not None


@pytest.mark.parametrize(("name", "batch"), [("scalar", 4), ("narrower", 4)])
def test_what_no_kernel_gives_is_computed_behind_the_blocks(name: str, batch: int) -> None:
    """An output that mixes samples, and one of another floating dtype."""
    assert sweep_of(check(Loop(STEPS[name]), SEQUENTIAL, given(batch, 12))) is None


HANDED_OVER: dict[str, Callable[[list[Any]], Any]] = {
    "first": torch.stack,
    "second": lambda collected: torch.stack(collected, 1),
    "last": lambda collected: torch.stack(collected, -1),
    "joined": lambda collected: torch.cat(collected, -1),
    "joined first": torch.cat,
    "reversed": lambda collected: torch.stack(collected[::-1], 1),
    "a part": lambda collected: torch.stack(collected[3:9]),
    "twice": lambda collected: [torch.stack(collected), torch.stack(collected, 1)],
    "with others": lambda collected: torch.stack([torch.zeros_like(collected[0]), *collected, collected[2] * 2], 1),
    "and the last": lambda collected: [torch.stack(collected), collected[-1] * 2],
    "one alone": lambda collected: collected[5] * 2,
    "a list": list,
}


@pytest.mark.parametrize("batch", [3, 32])
@pytest.mark.parametrize("name", HANDED_OVER)
def test_however_outputs_are_handed_over(name: str, batch: int) -> None:
    step = flux if batch == 3 or name in ("a part", "one alone") else gate
    assert sweep_of(check(Loop(step, HANDED_OVER[name]), SEQUENTIAL, given(batch, 12))) is not None


def states(m: Any, h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    h = torch.tanh(h @ m.weight + x)
    return h, h


@pytest.mark.parametrize("batch", [1, 11])
@pytest.mark.parametrize("name", ["first", "second", "last", "joined", "with others", "and the last", "twice"])
def test_however_states_are_handed_over(name: str, batch: int) -> None:
    fast = check(Loop(states, HANDED_OVER[name]), SEQUENTIAL, given(batch, 12))
    assert (sweep_of(fast) is None) == (name == "twice")


@pytest.mark.parametrize("kind", [nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize(("batch", "width"), [(1, 16), (20, 9)])
def test_cells(kind: type[nn.Module], batch: int, width: int) -> None:
    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = kind(3, width).double()

        def forward(self, h: Tensor, xs: Tensor) -> Any:
            state: Any = (h, h) if kind is nn.LSTMCell else h
            collected = []
            for x in xs.unbind(0):
                state = self.cell(x, state)
                collected.append(state[0] if kind is nn.LSTMCell else state)
            return torch.stack(collected, 1), state

    xs = torch.randn(9, batch, 3, dtype=torch.float64)
    fast = check(Cells(), SEQUENTIAL, (torch.randn(batch, width).double(), xs))
    assert sweep_of(fast) is not None


@pytest.mark.parametrize("batch", [2, 9])
def test_operands_of_the_head(batch: int) -> None:
    """Layers with parameters of their own, which kernels read where they lie, and a readout of each."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4).double() for _ in range(9))
            self.readouts = nn.ModuleList(nn.Linear(4, 2).double() for _ in range(9))

        def forward(self, h: Tensor) -> Any:
            collected = []
            for layer, readout in zip(self.layers, self.readouts, strict=True):
                h = torch.tanh(layer(h))
                collected.append(readout(h))
            return torch.stack(collected), h

    fast = check(Layers(), SEQUENTIAL, (torch.randn(batch, 4).double(),))
    sweep = sweep_of(fast)
    assert sweep is not None and sweep.joined is not None and sum(sweep.joined.operands) == 2


def test_states_that_are_transposed() -> None:
    class Transposed(Loop):
        def forward(self, h: Tensor, xs: Tensor) -> Any:
            collected = []
            for x in xs.unbind(0):
                h = torch.tanh(self.weight @ h + x.t())
                collected.append((h, h.cos()))
            return [torch.stack(one) for one in zip(*collected, strict=True)]

    h, xs = given(7, 9)
    check(Transposed(flux), SEQUENTIAL, (h.t().contiguous(), xs))


@pytest.mark.parametrize("batch", [3, 64])
def test_cotangents_of_some_alone(batch: int) -> None:
    """Those that are absent are zeros, whoever else has some; others lie in any manner."""
    model, (h, xs) = Loop(several, separately), given(batch, 9)
    fast = pcr_fx.transform(model, (h, xs), SEQUENTIAL)
    flat = len(torch.utils._pytree.tree_leaves(model(h, xs)))
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda one: one.sum(),
        lambda one: (one.movedim(-1, 0) * one.movedim(-1, 0).detach()).sum(),
        lambda one: one[2:3].sin().sum(),
    ]
    for index in range(flat):
        for way in ways:
            found = []
            for run in (fast, model):
                leaves = [h.clone().requires_grad_(), xs.clone().requires_grad_(), *model.parameters()]
                one = torch.utils._pytree.tree_leaves(run(*leaves[:2]))[index]
                if not one.requires_grad:
                    continue
                found.append(torch.autograd.grad(way(one), leaves, allow_unused=True, materialize_grads=True))
            for ours, theirs in zip(*found, strict=True) if found else []:
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_results_are_whose_they_are() -> None:
    """They can be written to, before a backward too, and share no memory with each other."""
    model, (h, xs) = Loop(states, lambda c: [torch.stack(c, 1), torch.stack(c[:5])]), given(4, 12)
    fast = pcr_fx.transform(model, (h, xs), SEQUENTIAL)
    found = []
    for run in (fast, model):
        leaf = h.clone().requires_grad_()
        (whole, part), _ = run(leaf, xs)
        assert whole.is_contiguous()
        whole.mul_(2)
        part.add_(1)
        found.append([whole, part, *torch.autograd.grad(whole.sin().sum() + part.cos().sum(), leaf)])
        with torch.no_grad():
            (whole, _), _ = run(h, xs)
        found[-1].append((whole.view(-1) * leaf[0, 0]).sum())
        whole.zero_()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_without_gradients_no_trajectory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = Loop(gate), given(4, 12)
    fast = pcr_fx.transform(model, inputs, SEQUENTIAL)
    kept = []
    sweep = pcr_fx.targets.CppKernel.sweep
    monkeypatch.setattr(pcr_fx.targets.CppKernel, "sweep", lambda *args: kept.append(sweep(*args)) or kept[-1])
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), model(*inputs), rtol=1e-12, atol=1e-12)
    fast(*inputs)
    assert [one is None for one in kept] == [False, False]  # the last state is one of it


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcr_fx.targets.cpp.kernel._OPERATIONS_A_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(Loop(several, separately), SEQUENTIAL, given(40, 9))
    finally:
        torch.set_num_threads(before)


def fluxes(m: Any, h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    """Two fluxes and a flag: every number is a sample of its own."""
    q, leak = m.rate * torch.relu(h - 0.1), 0.2 * torch.sigmoid(h)
    return h + 0.1 * x - q - leak, (q, h > 0.2, leak)


@pytest.mark.parametrize(("threads", "batch"), [(1, 75), (2, 75), (1, 2)])
def test_rows_that_lie_far_apart(threads: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are gone through some at a time: rows of 3 numbers, 4.8 KB apart, and of flags, which are nearer."""
    monkeypatch.setattr("pcr_fx.targets.cpp.kernel._OPERATIONS_A_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(
            Loop(fluxes, lambda c: [torch.stack(one, 1) for one in zip(*c, strict=True)]),
            SEQUENTIAL,
            given(batch, 200),
        )
    finally:
        torch.set_num_threads(before)


def test_many_cotangents_at_once() -> None:
    model, (h, xs) = Loop(several, lambda c: [torch.stack([one[0] for one in c], 1), c[-1][4] * 1]), given(2, 9)
    fast = pcr_fx.transform(model, (h, xs), SEQUENTIAL)
    assert len(results(fast, model, (h, xs))) > 0
    jacobians = [
        torch.autograd.functional.jacobian(lambda one, run=run: run(one, xs)[0][0].sum(1), h, vectorize=True)
        for run in (fast, model)
    ]
    torch.testing.assert_close(*jacobians, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", [gate, states])
def test_second_derivatives(step: Any) -> None:
    model, (h, xs) = Loop(step), given(3, 9)
    fast = pcr_fx.transform(model, (h, xs), SEQUENTIAL)

    def seconds(run: Any) -> Any:
        leaf = h.clone().requires_grad_()
        (first,) = torch.autograd.grad(run(leaf, xs)[0].square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [leaf, model.weight])

    torch.testing.assert_close(seconds(fast), seconds(model), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(seconds(fast), seconds(model), rtol=1e-11, atol=1e-11)


def test_torch_compile() -> None:
    model, inputs = Loop(several, separately), given(5, 12)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="deeppcr", options={"inner_backend": "aot_eager", **SEQUENTIAL})
    for ours, theirs in zip(results(fast, model, inputs), results(model, model, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_single_precision() -> None:
    model, inputs = Loop(several, separately), given(33, 20)
    exact = results(model, model, inputs)
    single, floats = model.float(), tuple(one.float() for one in inputs)
    fast = pcr_fx.transform(single, floats, SEQUENTIAL)
    for ours, eager, true in zip(results(fast, single, floats), results(single, single, floats), exact, strict=True):
        if not ours.is_floating_point():
            continue
        errors = [(one.double() - true).abs().max() for one in (ours, eager)]
        assert errors[0] <= 4 * errors[1] + 1e-5 * true.abs().max()


@pytest.mark.parametrize("way_in", ["transform", "compile"])
def test_where_new_tensors_are_on_another_device(way_in: str) -> None:
    """What native code is told lies on the CPU, whatever the default is."""
    model, inputs = Loop(flux, lambda collected: collected[2]), given(3, 20)
    torch._dynamo.reset()
    fast: Any = pcr_fx.transform(model, inputs, SEQUENTIAL)
    if way_in == "compile":
        fast = torch.compile(model, backend="deeppcr", options={"inner_backend": "aot_eager", **SEQUENTIAL})

    def gradient(run: Any) -> Any:
        output, state = run(*inputs)
        return torch.autograd.grad(output.sum() + state.square().sum(), model.rate)

    with torch.device("meta"):
        with torch.no_grad():
            ours = fast(*inputs)
        gradients = gradient(fast)
    torch.testing.assert_close(ours, model(*inputs), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, gradient(model), rtol=1e-12, atol=1e-12)
