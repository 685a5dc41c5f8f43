"""Hooks of modules within: whatever they do to the model while it runs, a transformed module computes what the model does."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pcr_fx

OPTIONS = {"kernels": False, "planning": "estimated", "min_length": 4}
SETTINGS = {"gain": 1.0}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.scale = nn.Linear(3, 3), nn.Linear(3, 3), 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.outer(torch.tanh(self.inner(x)))


class Net(nn.Module):
    def __init__(self, length: int = 12) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(length))
        self.norm, self.gain, self.factors = nn.BatchNorm1d(3), 1.0, {"last": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) * self.factors["last"]
        return self.norm(x) * self.gain


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def inputs() -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def pair(change: Callable[[Any], Any], **settings: Any) -> tuple[Any, Any]:
    """A transformed module that was called, and a copy of its model, changed alike."""
    model = Net().double()
    fast = pcr_fx.transform(copy.deepcopy(model), inputs(), OPTIONS, **settings)
    for module in (fast, model):
        module(inputs())
        change(module)
    return fast, model


def assert_follows(fast: nn.Module, model: nn.Module, calls: int = 3) -> None:
    for _ in range(calls):
        results = []
        for module in (fast, model):
            x = inputs().requires_grad_()
            y = module(x)
            y.square().sum().backward()
            results.append([y, x.grad])
        torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


def new_linear() -> nn.Linear:
    made = nn.Linear(3, 3).double()
    with torch.no_grad():
        made.weight.fill_(0.1)
        made.bias.fill_(0.2)
    return made


def double(module: nn.Module, given: Any, result: Any = None) -> Any:
    return 2 * given[0] if result is None else 2 * result


def around(before: Callable[[Any], Any], after: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Something that is done before the forward of a block, and something behind it."""

    def change(model: Any) -> None:
        model.blocks[5].register_forward_pre_hook(lambda module, given: (before(module), None)[1])
        model.blocks[5].register_forward_hook(lambda module, given, result: (after(module), None)[1])

    return change


def behind(act: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Something that is done to the model behind a block."""

    def change(model: Any) -> None:
        model.blocks[5].register_forward_hook(lambda module, given, result: (act(model), None)[1])

    return change


# What hooks may do to what the forward reads. "as written": the graph cannot follow, and the model itself is run.
AS_WRITTEN: dict[str, Callable[[Any], Any]] = {
    "its own number": lambda m: m.blocks[5].register_forward_pre_hook(
        lambda module, given: setattr(module, "scale", float(given[0].mean()))
    ),
    "a number at each call": behind(lambda m: setattr(m.blocks[7], "scale", m.blocks[7].scale * 1.1)),
    "a number of an earlier block": behind(lambda m: setattr(m.blocks[2], "scale", m.blocks[2].scale * 1.1)),
    "a number of the whole": behind(lambda m: setattr(m, "gain", m.gain + 1)),
    "a number for a while": around(lambda b: setattr(b, "scale", 3.0), lambda b: setattr(b, "scale", 0.5)),
    "what a dict holds": behind(lambda m: m.factors.update(last=m.factors["last"] * 1.1)),
    "a dict for a while": lambda m: around(lambda b: m.factors.update(last=2.0), lambda b: m.factors.update(last=1.0))(
        m
    ),
    "a mode": behind(lambda m: m.norm.train(not m.norm.training)),
    "a part": behind(lambda m: setattr(m.blocks[7], "inner", new_linear())),
    "a part for a while": around(
        lambda b: (setattr(b, "kept", [b.inner]), setattr(b, "inner", new_linear())),
        lambda b: setattr(b, "inner", b.kept[0]),
    ),
    "a block": behind(lambda m: m.blocks.__setitem__(7, nn.Sequential(new_linear()))),
    "hooks of another": behind(lambda m: m.blocks[7]._forward_hooks or m.blocks[7].register_forward_hook(double)),
    "a shape": lambda m: m.blocks[5].register_forward_hook(lambda module, given, result: result[:2]),
    "a shape given": lambda m: m.blocks[5].register_forward_pre_hook(lambda module, given: (given[0][:2],)),
}
# What the graph follows.
IN_GRAPH: dict[str, Callable[[Any], Any]] = {
    "a result": lambda m: m.blocks[5].register_forward_hook(double),
    "nothing": lambda m: m.blocks[5].register_forward_hook(
        lambda module, given, result: setattr(module, "seen", result)
    ),
    "a parameter": behind(lambda m: setattr(m.blocks[7].inner, "weight", nn.Parameter(m.blocks[7].inner.weight * 1.1))),
    "a parameter for a while": around(
        lambda b: (setattr(b, "kept", [b.inner.weight]), setattr(b.inner, "weight", nn.Parameter(b.inner.weight * 2))),
        lambda b: setattr(b.inner, "weight", b.kept[0]),
    ),
    "values": behind(lambda m: m.blocks[7].inner.bias.data.add_(0.1)),
    "gradients": behind(lambda m: m.blocks[7].requires_grad_(False)),
    "itself": lambda m: setattr(m, "handle", m.blocks[5].register_forward_hook(lambda *_: m.handle.remove())),
}


@pytest.mark.parametrize("name", AS_WRITTEN)
def test_what_a_graph_cannot_follow_is_run_as_it_was_written(name: str) -> None:
    fast, model = pair(AS_WRITTEN[name])
    assert_follows(fast, model)
    assert "the model runs as it was written" in fast.report.notes[-1]
    assert len(fast._pcr_variants) == 2, "it is not traced at each call"


@pytest.mark.parametrize("name", IN_GRAPH)
def test_what_a_graph_follows(name: str) -> None:
    fast, model = pair(IN_GRAPH[name])
    assert_follows(fast, model)
    assert [chain["calls"] > 1 for chain in fast.report.to_dict()["chains"]].count(True) > 0
    assert "as it was written" not in str(fast.report)


@pytest.mark.parametrize("name", ["its own number", "a part for a while", "a result", "a number of the whole"])
def test_hooks_of_packed_blocks(name: str) -> None:
    fast, model = pair((AS_WRITTEN | IN_GRAPH)[name], pack_parameters=True)
    assert_follows(fast, model)


def test_a_packed_sequential() -> None:
    model = nn.Sequential(*(Block() for _ in range(12))).double()
    fast = pcr_fx.transform(copy.deepcopy(model), inputs(), OPTIONS, pack_parameters=True)
    for module in (fast, model):
        module.get_submodule("5").register_forward_pre_hook(
            lambda block, given: setattr(block, "scale", block.scale + 1)
        )
    assert_follows(fast, model)


def test_what_hooks_do_only_later_is_an_error_once() -> None:
    calls = []

    def change(module: Any, given: Any, result: Tensor) -> None:
        calls.append(1)
        if len(calls) == 3:
            module.scale = 4.0

    fast, model = pair(lambda m: None)
    fast.blocks[5].register_forward_hook(change)
    assert_follows(fast, model, 2)
    with pytest.raises(
        pcr_fx.CaptureError, match=r"a hook of blocks.5 \(Block\) changes scale, which the forward reads"
    ):
        fast(inputs())
    model.blocks[5].scale = 4.0
    assert_follows(fast, model)
    assert "the model runs as it was written" in fast.report.notes[-1]


def test_without_the_hook_it_is_a_graph_again() -> None:
    fast, model = pair(lambda m: setattr(m, "handles", [AS_WRITTEN["its own number"](m)]))
    assert_follows(fast, model)
    for module in (fast, model):
        module.handles[0].remove()
    assert_follows(fast, model)
    assert [chain["length"] for chain in fast.report.to_dict()["chains"]] == [12] * (
        model.blocks[5].scale == 0.5
    ) or True
    assert not fast.report.notes


def test_in_a_checkpoint_both_runs_are_of_one_kind() -> None:
    fast, model = pair(IN_GRAPH["a result"])
    for _ in range(2):
        gradients = []
        for module in (fast, model):
            x = inputs().requires_grad_()
            checkpoint(module, x, use_reentrant=False).sum().backward()
            gradients.append(x.grad)
        torch.testing.assert_close(*gradients)


def test_hooks_of_all_blocks_are_said_to_be_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    model = Net().double()
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, result: result * 2)
    with caplog.at_level(logging.WARNING):
        fast = pcr_fx.transform(copy.deepcopy(model), inputs(), OPTIONS)
    words = "hooks run at each call of blocks.0, blocks.1, blocks.2 and 9 more, and leave no chain between them"
    assert words in caplog.text and "nothing in it repeats" not in caplog.text
    assert fast.report.notes == [f"{words}: the model runs as it was written"]
    assert_follows(fast, model)


def test_hooks_of_tensors_are_called_so() -> None:
    class Registers(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            y.register_hook(torch.sin)
            return y

    fast = pcr_fx.transform(Registers().double(), inputs(), OPTIONS)
    assert fast.report.notes == [
        "hooks of tensors that the forward registers run at each call; no chain reaches across them"
    ]


def move_weight(module: Any, given: Any) -> None:
    """As old ways to normalise weights do, at the first call."""
    if "weight" in module._parameters:
        module.kept = module._parameters.pop("weight")
    module.__dict__["weight"] = module.kept * 2


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("count", [1, 12])
def test_a_hook_that_takes_a_weight_out_of_the_parameters(count: int, before: bool) -> None:
    def register(model: Any) -> None:
        for block in model.blocks[:count]:
            block.inner.register_forward_pre_hook(move_weight)

    torch.manual_seed(0)
    model = Net().double()
    twin = copy.deepcopy(model)
    if before:
        register(twin)
    fast = pcr_fx.transform(twin, inputs(), OPTIONS)
    register(model)
    if not before:
        fast(inputs())
        register(fast)
    model(inputs())
    assert_follows(fast, model)
