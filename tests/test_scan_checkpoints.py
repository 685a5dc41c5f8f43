"""Loops that keep a few of their states, and compute those between anew for the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import relative_error
from torch import Tensor
from torch.autograd.profiler import profile
from torch.utils.checkpoint import checkpoint

import pcr_fx
from pcr_fx.loops import Loop

WEIGHT = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 3


def step_of(weight: Tensor) -> Any:
    def step(carry: tuple[Tensor, Tensor, Tensor], x: Tensor) -> tuple[Any, Any]:
        state, count, scale = carry
        new = torch.tanh(state @ weight + scale * x)
        return (new, count + 1, scale), {"before": state, "after": new, "gate": torch.sigmoid(new).sum(-1), "x": x}

    return step


def results(step: Any, length: int, options: dict[str, Any] | None, weight: Tensor) -> list[Tensor]:
    """What a loop returns, and the gradients of all that it is given; `None`: that of a loop in Python."""
    generator = torch.Generator().manual_seed(length)
    init = torch.randn(3, 4, dtype=torch.float64, generator=generator).requires_grad_()
    scale = torch.rand(4, dtype=torch.float64, generator=generator).requires_grad_()
    xs = torch.randn(length, 3, 4, dtype=torch.float64, generator=generator).requires_grad_()
    carry: Any = (init, torch.zeros((), dtype=torch.int64), scale)
    if options is None:
        said = []
        for x in xs:
            carry, y = step(carry, x)
            said.append(y)
        ys = {name: torch.stack([one[name] for one in said]) for name in said[0]}
    else:
        carry, ys = pcr_fx.scan(step, carry, xs, options=options)
    found = [*carry, *ys.values()]
    loss = sum(
        (one * torch.linspace(0.5, 1, one.numel(), dtype=one.dtype).view_as(one)).sum() for one in found[:1] + found[3:]
    )
    return [*found, *torch.autograd.grad(loss, [init, scale, xs, weight])]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(("length", "every"), [(7, 1), (7, 3), (12, 4), (12, 5), (12, 12), (12, 100), (1, 1)])
def test_results_and_gradients(length: int, every: int, kernels: bool) -> None:
    weight = WEIGHT.clone().requires_grad_()
    options = {"solver": "sequential", "kernels": kernels, "checkpoint": every}
    got = results(step_of(weight), length, options, weight)
    for ours, theirs in zip(got, results(step_of(weight), length, None, weight), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert relative_error(ours.double(), theirs.double()) < 1e-12


@pytest.mark.parametrize("solver", ["auto", "newton", "quasi-newton"])
def test_other_solvers(solver: str) -> None:
    weight = WEIGHT.clone().requires_grad_()
    got = results(step_of(weight), 40, {"solver": solver, "checkpoint": 16, "kernels": False}, weight)
    for ours, theirs in zip(got, results(step_of(weight), 40, None, weight), strict=True):
        assert relative_error(ours.double(), theirs.double()) < 1e-9


def kept_bytes(options: dict[str, Any], length: int = 4096) -> int:
    """Memory that is held between a forward and its backward."""
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).div(5).requires_grad_()
    init, xs = torch.zeros(32, 16), torch.ones(length, 1, 16)

    def step(carry: Tensor, x: Tensor) -> tuple[Tensor, None]:
        return torch.tanh(carry @ weight + x), None

    def run(steps: int) -> Tensor:
        return pcr_fx.scan(step, init, xs[:steps], options={"solver": "sequential", **options})[0]

    run(length).sum().backward()  # plans and compiles
    with profile(use_kineto=True, profile_memory=True) as profiler:
        final = run(length)
    assert final.requires_grad
    events = profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


def test_memory_is_bounded() -> None:
    every_state = 4096 * 32 * 16 * 4
    assert kept_bytes({}) >= every_state
    assert kept_bytes({"checkpoint": 128}) < every_state / 10
    assert kept_bytes({"memory_limit": every_state // 2}) < every_state / 10


def test_without_a_backward_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    run = Loop.run_at_once
    monkeypatch.setattr(Loop, "run_at_once", lambda self, *given: lengths.append(given[-1]) or run(self, *given))
    options = {"solver": "sequential", "kernels": False, "checkpoint": 2}

    def call(init: Tensor) -> Tensor:
        return pcr_fx.scan(lambda carry, _: (torch.sin(carry), None), init, length=6, options=options)[0]

    call(torch.ones(3))
    with torch.no_grad():
        call(torch.ones(3, requires_grad=True))
    assert lengths == [6, 6]
    call(torch.ones(3, requires_grad=True)).sum().backward()
    assert lengths[2:] == [2, 2, 2, 2, 2]  # the last part runs once, as its backward comes first


def test_second_derivatives_autocast_and_checkpoints_around() -> None:
    weight = WEIGHT.clone().requires_grad_()
    options = {"solver": "sequential", "kernels": False, "checkpoint": 3}

    def run(init: Tensor, options: dict[str, Any]) -> Tensor:
        def step(carry: Tensor, _: None) -> tuple[Tensor, None]:
            return torch.tanh(carry @ weight.to(carry.dtype)).to(carry.dtype), None

        return pcr_fx.scan(step, init, length=8, options=options)[0]

    def second(init: Tensor, options: dict[str, Any]) -> Tensor:
        (first,) = torch.autograd.grad(run(init, options).pow(2).sum(), init, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), init)[0]

    init = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    plain = {**options, "checkpoint": None}
    assert relative_error(second(init, options), second(init, plain)) < 1e-12
    around = checkpoint(run, init, options, use_reentrant=False)
    (got,) = torch.autograd.grad(around.sum(), init)
    assert relative_error(got, torch.autograd.grad(run(init, plain).sum(), init)[0]) < 1e-12
    low = init.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        sums = [run(low, each).float().sum() for each in (options, plain)]
    got, expected = (torch.autograd.grad(one, low)[0] for one in sums)
    assert relative_error(got, expected) < 0.05


def test_noise_is_drawn_once() -> None:
    def run(every: int | None) -> list[Tensor]:
        torch.manual_seed(0)
        weight = torch.full((3,), 0.5, dtype=torch.float64).requires_grad_()

        def step(carry: Tensor, _: None) -> tuple[Tensor, None]:
            return torch.tanh(carry * weight * torch.rand_like(carry) + torch.dropout(carry, 0.5, True)), None

        options = {"solver": "sequential", "kernels": False, "checkpoint": every}
        final, _ = pcr_fx.scan(step, torch.ones(2, 3, dtype=torch.float64), length=9, options=options)
        return [final, *torch.autograd.grad(final.sum(), weight), torch.rand(1)]

    for ours, theirs in zip(run(4), run(None), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_an_option_that_is_no_number_of_steps() -> None:
    with pytest.raises(pcr_fx.OptionError, match="checkpoint=0 is not allowed; it must be a whole number >= 1 or None"):
        pcr_fx.Options(checkpoint=0)
