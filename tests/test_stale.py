"""A transformed module computes what its model is now: whatever is changed after `transform`, or was on before."""

from __future__ import annotations

import copy
import functools
import math
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from changes import run_script
from torch import Tensor, is_grad_enabled, nn
from torch.nn.utils import parametrize, prune

import pcr_fx

QUICK = {"kernels": False, "planning": "estimated"}
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


def inputs() -> Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def pair(model: nn.Module | None = None, **settings: Any) -> tuple[Any, nn.Module]:
    """A transformed module and a copy of its model, with the same changes to come."""
    model = (model or Net()).double()
    fast = pcr_fx.transform(copy.deepcopy(model), inputs(), QUICK, **settings)
    fast(inputs())
    return fast, model


def assert_follows(fast: nn.Module, model: nn.Module) -> None:
    """Values, gradients of inputs and of parameters are the model's."""
    results = []
    for module in (fast, model):
        x = inputs().requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(parameter.grad for _, parameter in module.named_parameters())])
        module.zero_grad()
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


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
    fast, model = pair()
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
    fast, model = pair()
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
    fast, model = pair()
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
    fast, model = pair()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, given, result: 2 * result if isinstance(module, nn.Linear) else None
    )
    try:
        assert_follows(fast, model)
    finally:
        handle.remove()
    assert_follows(fast, model)


def test_a_hook_of_the_old_kind_is_refused() -> None:
    fast, _ = pair()
    fast.blocks[3].register_backward_hook(lambda module, to, by: None)
    with pytest.raises(pcr_fx.CaptureError, match="register_full_backward_hook hooks the module"):
        fast(inputs())


class Asking(nn.Module):
    """Runs blocks; `ask` is called first, and what it returns is a factor."""

    def __init__(self, ask: Callable[[Any, Tensor], float]) -> None:
        super().__init__()
        self.ask = ask
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(9)])

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.ask(self, x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


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


class InContainers(nn.Module):
    """Parameters and tensors that are found in lists, dicts and closures."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"leak": nn.Parameter(torch.full((3,), 0.3)), "table": torch.arange(9.0)}
        self.leak = self.kept["leak"]
        self.listed = [nn.Parameter(torch.randn(3)) for _ in range(9)]
        self.outside = [nn.Linear(3, 3).double()]
        shift = torch.ones(3)
        self.shift = lambda: shift

    def forward(self, x: Tensor) -> Tensor:
        for index, weight in enumerate(self.listed):
            x = (
                x
                - nn.functional.softplus(self.kept["leak"]) * x
                + torch.tanh(weight * 2) * float(self.kept["table"][index])
            )
        return self.outside[0](x + torch.exp(self.shift()))


def test_tensors_in_containers_are_read_at_each_call() -> None:
    model = InContainers()
    fast = pcr_fx.transform(model, inputs(), QUICK)
    assert_follows(fast, model)
    with torch.no_grad():
        for tensor in (model.leak, model.listed[3], model.kept["table"], model.shift(), model.outside[0].weight):
            tensor.mul_(2)
            torch.testing.assert_close(fast(inputs()), model(inputs()))
        model.listed[4] = nn.Parameter(torch.ones(3))
        torch.testing.assert_close(fast(inputs()), model(inputs()))
        model.outside[0].bias = None
        torch.testing.assert_close(fast(inputs()), model(inputs()))
        fast.leak = nn.Parameter(torch.ones(3))  # which the dict does not hear of
        torch.testing.assert_close(fast(inputs()), model(inputs()))
    model.kept["leak"].grad = model.listed[3].grad = None
    for _ in range(2):
        fast(inputs()).sum().backward()
        got = model.kept["leak"].grad, model.listed[3].grad
        model.kept["leak"].grad = model.listed[3].grad = None
        model(inputs()).sum().backward()
        torch.testing.assert_close(got, (model.kept["leak"].grad, model.listed[3].grad))
        model.kept["leak"].grad = model.listed[3].grad = None


class Adapted(nn.Module):
    """As adapters for fine-tuning are written."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = (
            nn.Linear(3, 3),
            nn.ModuleDict({"a": nn.Linear(3, 1)}),
            nn.ModuleDict({"a": nn.Linear(1, 3)}),
        )
        self.scaling, self.active, self.merged = {"a": 0.5}, ["a"], []

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        for name in self.active:
            if name in self.down and name not in self.merged:
                result = result + self.up[name](self.down[name](x)) * self.scaling[name]
        return torch.tanh(result)


def test_adapters_are_switched_scaled_and_merged() -> None:
    fast, model = pair(nn.Sequential(*(Adapted() for _ in range(9))))

    def add(module: Any) -> None:
        torch.manual_seed(3)
        module.down["b"], module.up["b"] = nn.Linear(3, 1).double(), nn.Linear(1, 3).double()
        module.scaling["b"] = 2.0

    steps: list[Callable[[Any], Any]] = [
        lambda module: module.scaling.update(a=0.25),
        lambda module: module.active.clear(),
        lambda module: module.active.extend(["a", "b"]),
        add,
        lambda module: module.merged.append("a"),
    ]
    for step in steps:
        for network in (fast, model):
            for module in network.children():
                step(module)
        assert_follows(fast, model)
    assert fast.report.chains


def test_a_forward_that_counts_its_calls_is_refused() -> None:
    class Counting(Asking):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return super().forward(x * self.calls)

    with pytest.raises(pcr_fx.CaptureError, match=r"the model keeps Counting\.calls from call to call"):
        pcr_fx.transform(Counting(lambda self, x: 1.0).double(), inputs())
    listing = Asking(lambda self, x: float(len(self.listed))).double()
    listing.listed, append = [1], listing.ask
    listing.ask = lambda self, x: (self.listed.append(2), append(self, x))[1]
    with pytest.raises(pcr_fx.CaptureError, match=r"the model keeps Asking\.listed from call to call"):
        pcr_fx.transform(listing, inputs())
    assert listing.listed == [1]


class Remembering(Asking):
    """Keeps a buffer and two other tensors from call to call."""

    last: Any = None

    def __init__(self) -> None:
        super().__init__(lambda self, x: 1.0)
        self.register_buffer("mean", torch.zeros(3))
        self.sum = torch.zeros(3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.sum = self.sum + self.mean
        before = self.last if self.last is not None else torch.zeros_like(x)
        self.last = x.detach() * 0.5
        return super().forward(x) + self.mean + self.sum + before


def test_what_a_forward_keeps_for_its_next_call_is_kept() -> None:
    model = Remembering().double()
    fast, graphs = pcr_fx.transform(copy.deepcopy(model), inputs(), QUICK), []
    for _ in range(4):
        torch.testing.assert_close(fast(inputs()), model(inputs()))
        torch.testing.assert_close((fast.mean, fast.sum, fast.last), (model.mean, model.sum, model.last))
        graphs.append(fast._pcr_variants[0])
    assert graphs[1] is graphs[3]
    assert all(type(value) is Tensor for value in fast.buffers())


def test_an_object_that_is_an_argument_is_looked_into() -> None:
    class Given(Asking):
        def forward(self, x: Tensor, given: Any) -> Tensor:
            return super().forward(x) * given.factor

    model, given = Given(lambda self, x: 1.0).double(), SimpleNamespace(factor=1.0)
    fast = pcr_fx.transform(model, (inputs(), given), QUICK)
    for given.factor in (1.0, 2.0, 3.0, 1.0):
        torch.testing.assert_close(fast(inputs(), given), model(inputs(), given))
    torch.testing.assert_close(
        fast(inputs(), SimpleNamespace(factor=3.0)), model(inputs(), SimpleNamespace(factor=3.0))
    )
    assert len(fast._pcr_variants) == 3


def test_what_a_forward_keeps_to_save_time_is_no_hindrance() -> None:
    class Caching(Asking):
        mask: Any = None

        def forward(self, x: Tensor) -> Tensor:
            if self.mask is None or self.mask.shape != x.shape:
                self.mask = torch.ones(x.shape, dtype=x.dtype).tril()
            return super().forward(x * self.mask)

    model = Caching(lambda self, x: 1.0).double()
    fast = pcr_fx.transform(model, inputs(), QUICK)
    for _ in range(2):
        torch.testing.assert_close(fast(inputs()), model(inputs()))


def test_moves_and_dtypes_that_a_forward_asked_for() -> None:
    fast, model = pair(Asking(lambda self, x: 1.0 + (self.layers[0].weight.dtype is torch.float32)))
    for module in (fast, model):
        module.float()
    torch.testing.assert_close(fast(inputs().float()), model(inputs().float()))
    for module in (fast, model):
        module.layers.double()
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
    fast, model = pair()
    for module in (fast, model):
        module.blocks[3].scale = {math.nan: math.nan, -0.0: 0.0}.get(value, 1.0)
        module(inputs())
        module.blocks[3].scale = value
    torch.testing.assert_close(fast(inputs()), model(inputs()), equal_nan=True)
    graphs = list(fast._pcr_variants)
    fast(inputs())
    assert fast._pcr_variants == graphs


def test_copies_and_pickles_see_changes_of_their_own() -> None:
    fast, model = pair()
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


@pytest.mark.parametrize(
    "made", [lambda blocks, count: blocks[:count], lambda blocks, count: nn.Sequential(*blocks[:count])]
)
def test_lists_of_modules_that_the_forward_makes(made: Any) -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.count = nn.ModuleList(nn.Linear(3, 3) for _ in range(12)), 9

        def forward(self, x: Tensor) -> Tensor:
            for block in made(self.blocks, self.count):
                x = x + torch.tanh(block(x))
            return x

    model, x = Sliced(), torch.randn(2, 3)
    fast = pcr_fx.transform(model, x, {"solver": "sequential", "kernels": False})
    torch.testing.assert_close(fast(x), model(x))
    assert fast.report.to_dict()["chains"][0]["length"] == 9
    fast.count = model.count = 11
    fast.blocks[2] = model.blocks[2] = nn.Linear(3, 3)
    torch.testing.assert_close(fast(x), model(x))
    assert fast.report.to_dict()["chains"][0]["length"] == 11


class Path(nn.Module):
    """Numbers that a forward wraps in a module, as interpolations are."""

    scale = 2.0

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)

    def forward(self, index: int) -> Tensor:
        return self.scale * self.values[..., index]


class Controlled(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], nn.Module]) -> None:
        super().__init__()
        self.wrap, self.inner = wrap, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        path = self.wrap(x)
        for index in range(9):
            x = torch.tanh(self.inner(x)) + path(index % 3)[..., None]
        return x


def test_modules_that_the_forward_makes_are_no_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model = pair(Controlled(Path))
    assert_follows(fast, model)
    assert [chain["length"] for chain in fast.report.to_dict()["chains"]] == [9] and len(fast._pcr_variants) == 1
    monkeypatch.setattr(Path, "scale", 3.0)  # their class is
    assert_follows(fast, model)
    assert len(fast._pcr_variants) == 2


def test_a_model_of_which_each_call_would_be_traced_anew_runs_as_it_was_written() -> None:
    template = Path(torch.zeros(1))

    def wrap(x: Tensor) -> nn.Module:
        made = copy.copy(template)  # past `__init__`
        made.__dict__["_buffers"] = {}
        made.register_buffer("values", x)
        return made

    fast, model = pair(Controlled(wrap))
    assert_follows(fast, model)
    assert len(fast._pcr_variants) == 1
    assert any("traced anew" in note for note in fast.report.notes)


class Frozen(OrderedDict[str, float]):
    """A configuration that refuses to be written to, as diffusers' is."""

    def __setitem__(self, *_: Any) -> None:
        raise TypeError("it is frozen")

    clear = update = __setitem__  # type: ignore[assignment]

    def __deepcopy__(self, memo: Any) -> Frozen:
        return self


def test_a_container_that_refuses_writes_is_left_as_it_is() -> None:
    settings = Frozen()
    OrderedDict.__setitem__(settings, "rate", 2.0)

    def ask(self: Any, x: Tensor) -> float:
        return self.settings["rate"]

    model = Asking(ask)
    model.settings = settings
    fast, model = pair(model)
    assert_follows(fast, model)
    OrderedDict.__setitem__(settings, "rate", 3.0)
    assert_follows(fast, model)
