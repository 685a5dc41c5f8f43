"""What a forward reads of lists, dicts, adapters and objects, and what it makes itself: read anew, or seen to have changed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stale_models import QUICK, Asking, assert_follows, inputs, pair
from torch import Tensor, nn

import pcr_fx


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


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
