"""Checkpoints around blocks: the chain is found, and what its author wanted to be let go is let go."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import pcr_fx


class Model(nn.Module):
    def __init__(self, step: Callable[[nn.Module, Tensor], Tensor], dropout: float = 0.0, length: int = 12) -> None:
        super().__init__()
        self.step = step
        blocks = (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(dropout)) for _ in range(length))
        self.blocks = nn.ModuleList(blocks).double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.step(block, x)
        return x


class Segments(Model):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.blocks, 3, x, use_reentrant=False)


def two_results(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda v: (block(v), v), x, use_reentrant=False)[0] + x


STEPS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "a part of a block": lambda block, x: x + checkpoint(block, x, use_reentrant=False),
    "a whole block": lambda block, x: checkpoint(lambda v: v + block(v), x, use_reentrant=False),
    "as it used to be": lambda block, x: x + checkpoint(block, x, use_reentrant=True),
    "two results": two_results,
    "one within another": lambda block, x: checkpoint(
        lambda v: v + checkpoint(block, v, use_reentrant=False), x, use_reentrant=False
    ),
}


def gradients(model: nn.Module, run: Any, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("way", ["transform", "compile"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", STEPS)
def test_a_checkpoint_in_each_block(name: str, dropout: float, way: str) -> None:
    torch.manual_seed(0)
    model, x = Model(STEPS[name], dropout), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    options = {"solver": "sequential", "kernels": False}
    if way == "transform":
        fast: Any = pcr_fx.transform(model, x, options=options)
    else:
        torch._dynamo.reset()
        fast = torch.compile(model, backend="deeppcr", options={**options, "inner_backend": "eager"})
    wanted = gradients(model, model, x)
    torch.testing.assert_close(gradients(model, fast, x), wanted, rtol=1e-11, atol=1e-11)
    report = pcr_fx.report(fast) if way == "transform" else pcr_fx.report()
    assert [chain["length"] for chain in report.to_dict()["chains"]] == [12], str(report)


def test_segments_of_blocks() -> None:
    model, x = Segments(two_results), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    fast = pcr_fx.transform(model, x, options={"solver": "sequential", "kernels": False})
    torch.testing.assert_close(gradients(model, fast, x), gradients(model, model, x), rtol=1e-11, atol=1e-11)
    assert [chain["length"] for chain in fast.report.to_dict()["chains"]] == [12], str(fast.report)


def saved_between(run: Any, x: Tensor) -> int:
    """How many tensors of the shape of what lies within a block are kept for the backward."""
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: shapes.append(tuple(one.shape)) or one, lambda one: one):
        run(x)
    return sum(shape == (3, 50) for shape in shapes)


def test_a_chain_that_is_left_alone_keeps_no_more_than_the_model() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 50), nn.Tanh(), nn.Linear(50, 4)) for _ in range(12))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=False)  # type: ignore[operator]
            return x

    model, x = Wide().double(), torch.randn(3, 4, dtype=torch.float64)
    fast = pcr_fx.transform(model, x, options={"planning": "estimated", "kernels": False})
    wanted = gradients(model, model, x)
    torch.testing.assert_close(gradients(model, fast, x), wanted, rtol=1e-11, atol=1e-11)
    assert "the model's own ops" in str(fast.report)
    assert saved_between(fast, x) == saved_between(model, x) == 0


def test_a_compiler_behind_a_chain_computes_again_what_it_was_to() -> None:
    kept: list[int] = []

    class Tail(Model):
        """A chain, and checkpoints that are in none."""

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return checkpoint(lambda v: torch.tanh(torch.sin(torch.cos(v))), x, use_reentrant=False)

    def inner(module: torch.fx.GraphModule, inputs: Any) -> Any:
        kept.extend("recompute" in node.meta for node in module.graph.nodes if node.target in (torch.sin, torch.cos))
        return module.forward

    torch._dynamo.reset()
    model, x = Tail(STEPS["a whole block"]), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    options = {"solver": "sequential", "kernels": False, "inner_backend": inner}
    fast = torch.compile(model, backend="deeppcr", options=options)
    torch.testing.assert_close(gradients(model, fast, x), gradients(model, model, x), rtol=1e-11, atol=1e-11)
    assert kept == [True, True]


@pytest.mark.parametrize("solver", ["sequential", "newton"])
def test_gradients_of_gradients(solver: str) -> None:
    """Checkpoints have hooks on saved tensors, which the transforms that second derivatives are made by do not allow."""
    model, x = Model(STEPS["a whole block"]), torch.randn(3, 4, dtype=torch.float64)
    fast = pcr_fx.transform(model, x, options={"solver": solver, "kernels": False})
    results = []
    for run in (fast, model):
        given = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(run(given).square().sum(), given, create_graph=True)
        results.append(
            torch.autograd.grad(gradient.square().sum(), [given, *model.parameters()], materialize_grads=True)
        )
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    assert len(fast.report.chains) == 1
