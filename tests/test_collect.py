"""What is collected of a chain's states is handed over whole, forward and backward, however it is collected."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pcr_fx
from pcr_fx.node import SolveNode
from pcr_fx.operands import collect

LENGTH = 12
Collect = Callable[[Tensor, list[Tensor]], Any]

COLLECTIONS: dict[str, Collect] = {
    "stacked first": lambda x, hs: torch.stack(hs),
    "stacked second": lambda x, hs: torch.stack(hs, 1),
    "stacked last": lambda x, hs: torch.stack(hs, dim=-1),
    "stacked last but one": lambda x, hs: torch.stack(tensors=hs, dim=-2),
    "joined": lambda x, hs: torch.cat(hs),
    "joined features": lambda x, hs: torch.cat(hs, -1),
    "joined second": lambda x, hs: torch.concat(hs, dim=1),
    "with the start": lambda x, hs: torch.stack([x, *hs], 1),
    "joined to the start": lambda x, hs: torch.cat([x, *hs], 1),
    "reversed": lambda x, hs: torch.stack(hs[::-1], 1),
    "every third": lambda x, hs: torch.stack(hs[1::3]),
    "a part": lambda x, hs: torch.stack(hs[2:9]),
    "two parts": lambda x, hs: torch.cat([*hs[:5], x, *hs[7:]]),
    "out of order": lambda x, hs: torch.stack([hs[3], hs[7], hs[1], *hs[:6]]),
    "twice": lambda x, hs: (torch.stack(hs), torch.cat(hs, 1)),
    "with taps": lambda x, hs: (torch.stack(hs).tanh(), hs[3] * 2, hs[-1]),
    "beside": lambda x, hs: (torch.hstack(hs), torch.vstack(hs), torch.column_stack(hs), torch.dstack(hs)),
    "growing": lambda x, hs: functools.reduce(lambda out, h: torch.cat([out, h], 1), hs, x),
    "growing in front": lambda x, hs: functools.reduce(lambda out, h: torch.cat([h, out]), hs, x),
    "the last alone": lambda x, hs: hs[-1],
}


class Recurrence(nn.Module):
    """One state, or two that are collected in turn."""

    def __init__(self, collection: Collect, states: int = 1) -> None:
        super().__init__()
        self.collection, self.states = collection, states
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.float64) / 2)

    def forward(self, x: Tensor, xs: Tensor) -> Any:
        h, c, hs, cs = x, 0.5 * x, [], []
        for t in range(xs.shape[0]):
            h = torch.tanh(h @ self.weight + xs[t] + (c if self.states == 2 else 0))
            if self.states == 2:
                c = 0.9 * c + h
                cs.append(c)
            hs.append(h)
        found = self.collection(x, hs)
        return (found, self.collection(0.5 * x, cs)) if self.states == 2 else found


def nodes_of(fast: Any) -> list[SolveNode]:
    return [module for module in fast._pcr_variants[0].run.modules() if isinstance(module, SolveNode)]


def results(run: Callable[..., Any], inputs: tuple[Tensor, ...], weight: Tensor) -> list[Tensor]:
    """All that a model returns, and its gradients of a weighting of that."""
    leaves = [*(x.clone().requires_grad_() for x in inputs), weight]
    found = run(*leaves[:-1])
    flat: list[Tensor] = torch.utils._pytree.tree_leaves(found)
    total = sum((one * torch.linspace(-1, 1, one.numel(), dtype=one.dtype).view(one.shape)).sum() for one in flat)
    return [*flat, *torch.autograd.grad(total, leaves)]  # type: ignore[arg-type]


def check(model: Recurrence, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, dtype=torch.float64), torch.randn(LENGTH, 2, 3, dtype=torch.float64)
    fast = pcr_fx.transform(model, inputs, options)
    for ours, theirs in zip(results(fast, inputs, model.weight), results(model, inputs, model.weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert ours.stride() == theirs.stride()
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), model(*inputs), rtol=1e-12, atol=1e-12)
    assert len(fast.report.chains) == 1
    return fast


@pytest.mark.parametrize("states", [1, 2])
@pytest.mark.parametrize("name", COLLECTIONS)
@pytest.mark.parametrize("way", ["kernel", "newton"])
def test_collections(name: str, states: int, way: str) -> None:
    options = {"solver": "sequential"} if way == "kernel" else {"solver": "newton", "kernels": False}
    fast = check(Recurrence(COLLECTIONS[name], states), options)
    (node,) = nodes_of(fast)
    assert len(node.leaving.whole) == (states if name != "the last alone" else 0)
    assert len(node.leaving.taps) <= 3 * states  # all others lie in what is whole


@pytest.mark.parametrize("name", ["stacked second", "two parts", "with taps"])
def test_collections_of_a_chain_that_is_left_alone(name: str) -> None:
    check(Recurrence(COLLECTIONS[name]), {"solver": "auto", "kernels": False, "planning": "estimated"})


def test_vectors_beside_each_other() -> None:
    class Vectors(Recurrence):
        def forward(self, x: Tensor, xs: Tensor) -> Any:
            h, hs = x[0], []
            for t in range(xs.shape[0]):
                h = torch.tanh(self.weight @ h + xs[t, 0])
                hs.append(h)
            return torch.hstack(hs), torch.vstack(hs), torch.column_stack(hs), torch.dstack(hs)

    (node,) = nodes_of(check(Vectors(COLLECTIONS["beside"]), {"solver": "sequential", "kernels": False}))
    assert len(node.leaving.whole) == 1 and len(node.leaving.taps) == LENGTH  # dstack makes three dimensions of one


def test_a_layer_on_top_of_another_is_given_its_trajectory() -> None:
    class Layers(Recurrence):
        def forward(self, x: Tensor, xs: Tensor) -> Any:
            hs: Any = xs
            for _ in range(2):
                h, below, hs = x, hs, []
                for t in range(len(below)):
                    h = torch.tanh(h @ self.weight + below[t])
                    hs.append(h)
            return torch.stack(hs)

    model = Layers(COLLECTIONS["twice"])
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, dtype=torch.float64), torch.randn(LENGTH, 2, 3, dtype=torch.float64)
    fast = pcr_fx.transform(model, inputs, {"solver": "sequential"})
    for ours, theirs in zip(results(fast, inputs, model.weight), results(model, inputs, model.weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert [node.leaving.taps for node in nodes_of(fast)] == [(), ()]


def test_second_derivatives_and_vmap() -> None:
    model = Recurrence(COLLECTIONS["with the start"])
    torch.manual_seed(0)
    x, xs = torch.randn(2, 3, dtype=torch.float64), torch.randn(LENGTH, 2, 3, dtype=torch.float64)
    fast = pcr_fx.transform(model, (x, xs), {"solver": "sequential"})

    def hessian_row(run: Any) -> Tensor:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(run(leaf, xs).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    torch.testing.assert_close(hessian_row(fast), hessian_row(model), rtol=1e-12, atol=1e-12)
    mapped = [torch.vmap(lambda x, run=run: run(x, xs))(torch.stack([x, 2 * x])) for run in (fast, model)]
    torch.testing.assert_close(*mapped, rtol=1e-12, atol=1e-12)


def test_what_is_handed_over_is_the_callers_own() -> None:
    """Written to, it changes neither what a backward finds nor what else was returned."""
    model = Recurrence(COLLECTIONS["twice"])
    x, xs = torch.randn(2, 3, dtype=torch.float64), torch.randn(LENGTH, 2, 3, dtype=torch.float64)
    fast = pcr_fx.transform(model, (x, xs), {"solver": "sequential"})
    gradients = []
    for run in (model, fast):
        first, second = run(x, xs)
        second.mul_(2)
        (first.sum() + second.sum()).backward()
        gradients.append((first, second, model.weight.grad))
        model.weight.grad = None
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_torch_compile_collects_as_well() -> None:
    model = Recurrence(COLLECTIONS["with the start"])
    x, xs = torch.randn(2, 3, dtype=torch.float64), torch.randn(LENGTH, 2, 3, dtype=torch.float64)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="deeppcr", options={"inner_backend": "eager", "solver": "sequential"})
    for ours, theirs in zip(results(fast, (x, xs), model.weight), results(model, (x, xs), model.weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [-2, -1, 0, 1])
@pytest.mark.parametrize("joins", [False, True])
def test_parts_of_trajectories_and_of_lists(dim: int, joins: bool) -> None:
    whole, start = torch.randn(9, 2, 4), torch.randn(2, 4)
    expected = (torch.cat if joins else torch.stack)([start, whole[7], whole[5], whole[3]], dim)
    for states in (whole, list(whole)):
        assert torch.equal(collect([start, (states, 7, 3, -2)], dim, joins), expected)


def test_a_result_that_the_state_is_read_back_from() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.float64) / 2)

        def forward(self, x: Tensor, xs: Tensor) -> Tensor:
            out = x[:, None]
            for t in range(xs.shape[0]):
                out = torch.cat([out, torch.tanh(out[:, -1] @ self.weight + xs[t])[:, None]], dim=1)
            return out

    model = Growing()
    x, xs = torch.randn(2, 3, dtype=torch.float64), torch.randn(LENGTH, 2, 3, dtype=torch.float64)
    fast = pcr_fx.transform(model, (x, xs), {"solver": "sequential", "kernels": False})
    for ours, theirs in zip(results(fast, (x, xs), model.weight), results(model, (x, xs), model.weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert fast.report.chains[0].chain.length >= LENGTH - 1
