"""A transformed module computes what its model is now: whatever is changed after `transform`, or was on before."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from changes import run_script
from stale_models import QUICK, Asking, assert_follows, inputs, pair
from torch import Tensor, is_grad_enabled, nn
from torch.nn.utils import parametrize, prune

import pcr_fx

SCALE = 1.0


class Block(nn.Module):
    usual = 1.0

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 3)
        self.scale, self.on, self.config, self.factors = 0.5, True, config, [1.0, {"last": 2.0}]
        self.register_buffer("mean", torch.zeros(3))
        self.act: Callable[[Tensor], Tensor] = torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        y = self.outer(self.act(self.inner(x) - self.mean)) * self.factors[1]["last"] * self.usual * self.config.gain
        return x + self.scale * y if self.on else x


class Net(nn.Module):
    def __init__(self, length: int = 9) -> None:
        super().__init__()
        self.config = SimpleNamespace(gain=1.0, dims=[1, 2], array=np.ones(2))
        self.blocks = nn.ModuleList([Block(self.config) for _ in range(length)])
        self.tail = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = x * len(self.config.dims) * float(self.config.array[0]) * SCALE
        for block in self.blocks:
            x = block(x)
        return self.tail(x)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def double(module: nn.Module, given: Any, result: Any = None) -> Any:
    return 2 * given[0] if result is None else 2 * result


class Twice(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


def exchange(model: Any) -> None:
    torch.manual_seed(5)
    model.blocks[4].inner.weight = nn.Parameter(torch.randn(3, 3).double())


def tie(model: Any) -> None:
    model.blocks[4].inner.weight = model.blocks[5].inner.weight


def untie(model: Any) -> None:
    tie(model)
    model(inputs())
    exchange(model)


def patch(model: Any) -> None:
    model.blocks[4].forward = MethodType(lambda self, x: 3 * self.inner(x), model.blocks[4])


def other_block(model: Any) -> Block:
    torch.manual_seed(6)
    return Block(model.config).double()


def set_class(model: Any) -> None:
    class Other(Block):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.blocks[3].__class__ = Other


def load(model: Any) -> None:
    torch.manual_seed(7)
    model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()}, assign=True)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "number": lambda m: setattr(m.blocks[3], "scale", 0.25),
    "flag": lambda m: setattr(m.blocks[3], "on", False),
    "function": lambda m: setattr(m.blocks[3], "act", torch.sin),
    "deleted, found in the class": lambda m: (
        setattr(m.blocks[2], "usual", 3.0),
        m(inputs()),
        delattr(m.blocks[2], "usual"),
    ),
    "instance over class": lambda m: setattr(m.blocks[2], "usual", 3.0),
    "configuration": lambda m: setattr(m.config, "gain", 0.5),
    "list in configuration": lambda m: m.config.dims.append(3),
    "array in configuration": lambda m: m.config.array.__setitem__(0, 2.0),
    "another configuration": lambda m: setattr(m.blocks[1], "config", SimpleNamespace(gain=3.0)),
    "changes in another configuration": lambda m: (
        setattr(m.blocks[1], "config", SimpleNamespace(gain=1.0)),
        m(inputs()),
        setattr(m.blocks[1].config, "gain", 3.0),
    ),
    "nested list": lambda m: m.blocks[5].factors[1].update(last=-1.0),
    "submodule": lambda m: setattr(m.blocks[3], "inner", nn.Linear(3, 3, bias=False).double()),
    "block": lambda m: m.blocks.__setitem__(3, other_block(m)),
    "block appended": lambda m: m.blocks.append(other_block(m)),
    "block inserted": lambda m: m.blocks.insert(2, other_block(m)),
    "block removed": lambda m: m.blocks.__delitem__(2),
    "block removed, and another after": lambda m: (m.blocks.__delitem__(2), m(inputs()), m.blocks.pop(0)),
    "blocks of a Sequential": lambda m: m.tail.append(nn.Tanh()),
    "part of a new block": lambda m: (
        m.blocks.__setitem__(3, other_block(m)),
        m(inputs()),
        setattr(m.blocks[3], "scale", 5.0),
    ),
    "hook of a new block": lambda m: (
        m.blocks.__setitem__(3, other_block(m)),
        m(inputs()),
        m.blocks[3].inner.register_forward_hook(double),
    ),
    "parameter": exchange,
    "parameter tied": tie,
    "parameter untied": untie,
    "parameter removed": lambda m: m.blocks[4].inner.register_parameter("bias", None),
    "parameter frozen": lambda m: m.blocks[4].inner.weight.requires_grad_(False),
    "buffer": lambda m: setattr(m.blocks[4], "mean", torch.ones(3).double()),
    "buffer written": lambda m: m.blocks[4].mean.add_(1),
    "load": load,
    "mode": lambda m: (setattr(m.tail[1], "p", 1.0), m.train(), m(inputs()), m.eval()),
    "rate": lambda m: setattr(m.tail[1], "p", 1.0),
    "forward hook": lambda m: m.blocks[3].register_forward_hook(double),
    "pre-hook": lambda m: m.blocks[3].register_forward_pre_hook(double),
    "backward hook": lambda m: m.blocks[3].register_full_backward_hook(lambda module, to, by: tuple(2 * g for g in to)),
    "backward pre-hook": lambda m: m.tail.register_full_backward_pre_hook(lambda module, by: (2 * by[0],)),
    "hook with keywords": lambda m: m.blocks[0].register_forward_hook(
        lambda module, args, kwargs, result: 2 * result, with_kwargs=True
    ),
    "hook removed": lambda m: (h := m.blocks[3].register_forward_hook(double), m(inputs()), h.remove()),
    "hook put first": lambda m: (
        m.blocks[3].register_forward_hook(double),
        m(inputs()),
        m.blocks[3].register_forward_hook(lambda module, given, result: result + 1, prepend=True),
    ),
    "hooks of all": lambda m: [block.register_forward_hook(double) for block in m.blocks],
    "parametrized": lambda m: parametrize.register_parametrization(m.blocks[3].inner, "weight", Twice()),
    "all parametrized": lambda m: [parametrize.register_parametrization(b.inner, "weight", Twice()) for b in m.blocks],
    "no longer parametrized": lambda m: (
        parametrize.register_parametrization(m.blocks[3].inner, "weight", Twice()),
        m(inputs()),
        parametrize.remove_parametrizations(m.blocks[3].inner, "weight"),
    ),
    "pruned": lambda m: prune.l1_unstructured(m.blocks[3].inner, "weight", 0.5),
    "no longer pruned": lambda m: (
        prune.l1_unstructured(m.blocks[3].inner, "weight", 0.5),
        m(inputs()),
        prune.remove(m.blocks[3].inner, "weight"),
    ),
    "weight norm": lambda m: nn.utils.weight_norm(m.blocks[3].inner),
    "weight norm as a parametrization": lambda m: nn.utils.parametrizations.weight_norm(m.blocks[3].inner),
    "spectral norm": lambda m: nn.utils.spectral_norm(m.blocks[3].inner.eval()),
    "forward of one block": patch,
    "class of one block": set_class,
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_is_seen(name: str) -> None:
    fast, model = pair(Net())
    for module in (fast, model):
        torch.manual_seed(2)
        CHANGES[name](module)
    assert_follows(fast, model)
    assert_follows(fast, model)


@pytest.mark.parametrize(
    "name", ["forward hook", "pre-hook", "backward hook", "weight norm", "pruned", "forward of one block"]
)
def test_what_was_on_before_is_kept(name: str) -> None:
    model, twin = Net().double(), Net().double()
    twin.load_state_dict(model.state_dict())
    for module in (model, twin):
        CHANGES[name](module)
    fast = pcr_fx.transform(twin, inputs(), QUICK)
    assert_follows(fast, model)
    for module in (fast, model):
        module.blocks[2].scale = 3.0
    assert_follows(fast, model)


def test_the_model_stays_parametrized_where_what_was_made_of_it_no_longer_is() -> None:
    model = Net().double()
    plain = model(inputs())
    parametrize.register_parametrization(model.blocks[3].inner, "weight", Twice())
    fast, twice = pcr_fx.transform(model, inputs(), QUICK), model(inputs())
    parametrize.remove_parametrizations(fast.blocks[3].inner, "weight", leave_parametrized=False)
    torch.testing.assert_close(fast(inputs()), plain)
    torch.testing.assert_close(model(inputs()), twice)


def test_what_is_as_it_was_is_not_traced_again() -> None:
    fast, model = pair(Net())
    graph = fast._pcr_variants[0]
    fast.blocks[3].unread = 3
    fast.blocks[3].scale = 0.25 + 0.25
    fast.config.dims = [1, 2]
    fast.zero_grad()
    fast.blocks[3].factors[1]["last"] = float("2")
    assert_follows(fast, model)
    assert fast._pcr_variants == [graph]
    fast.config.dims.append(3)  # the new list is looked at as well
    model.config.dims.append(3)
    assert_follows(fast, model)


def test_what_the_class_and_the_module_of_python_say_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model = pair(Net())
    monkeypatch.setattr(Block, "usual", 2.0)
    assert_follows(fast, model)
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x: 2 * forward(self, x))
    assert_follows(fast, model)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert_follows(fast, model)


def test_a_hook_that_looks_on_looks_on_at_each_call() -> None:
    model, seen = Net().double(), []
    model.blocks[5].register_forward_hook(lambda module, given, result: seen.append((module, given[0], result)))
    fast = pcr_fx.transform(model, inputs(), QUICK)
    assert not seen
    for _ in range(2):
        fast(inputs())
    model(inputs())
    assert len(seen) == 3 and seen[0][0] is fast.blocks[5]
    for got, expected in zip(seen[1][1:], seen[2][1:], strict=True):
        torch.testing.assert_close(got, expected)
    assert "hooks run at each call of blocks.5" in fast.report.notes[0]


def test_global_hooks_run() -> None:
    fast, model = pair(Net())
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, given, result: 2 * result if isinstance(module, nn.Linear) else None
    )
    try:
        assert_follows(fast, model)
    finally:
        handle.remove()
    assert_follows(fast, model)


def test_a_hook_of_the_old_kind_is_refused() -> None:
    fast, _ = pair(Net())
    fast.blocks[3].register_backward_hook(lambda module, to, by: None)
    with pytest.raises(pcr_fx.CaptureError, match="register_full_backward_hook hooks the module"):
        fast(inputs())


def test_modes_of_pytorch_are_asked_for_at_each_call() -> None:
    fast, model = pair(Asking(lambda self, x: 1.0 + is_grad_enabled() + 3 * torch.is_autocast_enabled("cpu")))
    assert_follows(fast, model)
    with torch.no_grad():
        torch.testing.assert_close(fast(inputs()), model(inputs()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(fast(inputs()), model(inputs()))
    assert_follows(fast, model)


@pytest.mark.parametrize("switch", [torch.no_grad, torch.enable_grad])
def test_modes_that_the_forward_switches_itself_are_no_facts(switch: Any) -> None:
    def ask(self: Any, x: Tensor) -> float:
        with switch(), torch.autocast("cpu", dtype=torch.bfloat16):
            return 1.0 + is_grad_enabled() + 3 * torch.is_grad_enabled() + torch.is_autocast_enabled("cpu")

    fast, model = pair(Asking(ask))
    for _ in range(2):
        assert_follows(fast, model)
        with torch.no_grad():
            torch.testing.assert_close(fast(inputs()), model(inputs()))
    assert len(fast._pcr_variants) <= 2  # entering a mode asks for the one before


@pytest.mark.parametrize("known", [True, False])
def test_a_traced_tensor_is_a_tensor(known: bool) -> None:
    def ask(self: Any, x: Tensor) -> float:
        weight = self.layers[0].weight
        checks = isinstance(x, Tensor), torch.is_tensor(x + 1), isinstance(x.T, Tensor), isinstance(weight, Tensor)
        return 1.0 + sum(checks) + 7 * isinstance(x, (tuple, list, float, nn.Parameter))

    model = Asking(ask).double()
    fast = pcr_fx.transform(model, inputs() if known else None, QUICK)
    torch.testing.assert_close(fast(inputs()), model(inputs()))


def test_bound_methods_and_partial_functions_are_the_copys_own() -> None:
    model = Net().double()
    for block in model.blocks:
        block.before = block.forward
        block.forward = functools.partial(lambda module, x: module.before(x) * module.scale, block)
    model.plain = list(model.blocks)
    fast = pcr_fx.transform(model, inputs(), QUICK)
    assert fast.plain[3] is fast.blocks[3]
    twin = copy.deepcopy(model)
    for network in (fast, twin):
        network.blocks[3].scale = 3.0
        network.plain[4].inner = nn.Identity()
    assert_follows(fast, twin)
    assert model.blocks[3].scale == 0.5


@pytest.mark.parametrize("value", [math.nan, -0.0, 1, True])
def test_values_that_are_equal_and_not_the_same(value: Any) -> None:
    fast, model = pair(Net())
    for module in (fast, model):
        module.blocks[3].scale = {math.nan: math.nan, -0.0: 0.0}.get(value, 1.0)
        module(inputs())
        module.blocks[3].scale = value
    torch.testing.assert_close(fast(inputs()), model(inputs()), equal_nan=True)
    graphs = list(fast._pcr_variants)
    fast(inputs())
    assert fast._pcr_variants == graphs


def test_copies_and_pickles_see_changes_of_their_own() -> None:
    fast, model = pair(Net())
    copied = copy.deepcopy(fast)
    for module in (copied, model):
        module.blocks[3].scale = 3.0
    assert_follows(copied, model)
    for module in (copied, model):
        module.blocks[3].register_forward_hook(double)
    assert_follows(copied, model)


@pytest.mark.parametrize("number", range(4))
def test_random_changes(number: int) -> None:
    """`python -m tests.changes` runs as many as are wanted."""
    assert run_script(number, seed=2)
