"""Blocks that no solver runs: the inner backend compiles one body for all of them, which computes what the model does."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import pcr_fx
from pcr_fx import inner
from pcr_fx.reports import RegionEntry, RewriteReport

pytestmark = pytest.mark.usefixtures("fresh_compiler")

# What traces forward and backward as Inductor does, and compiles nothing.
TRACING = {"regions": True, "inner_backend": "aot_eager"}


class Attention(nn.Module):
    """A transformer's block, with dropout."""

    def __init__(self, width: int = 16, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mixed, self.projected = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.heads, self.dropout = heads, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.mixed(self.norms[0](x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.projected(y))
        return x + self.dropout(self.down(F.gelu(self.up(self.norms[1](x)))))


class Stack(nn.Module):
    """Blocks between two layers; what is done with the states, a subclass says."""

    def __init__(self, blocks: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Attention(dropout=dropout) for _ in range(blocks))

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


class Taps(Stack):
    def forward(self, x: Tensor) -> Any:
        states = [self.first(x)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return tuple(states)


class Checkpointed(Stack):
    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class WithinAutocast(Stack):
    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.float16):  # not the dtype that a CPU has by default
            return super().forward(x).float()


class TwoStates(nn.Module):
    """Two states and a parameter that all blocks share; the first block is given one tensor as both."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
        self.shared = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x
        for layer in self.layers:
            x, y = torch.tanh(layer(x)).sin() + 0.5 * y * self.shared, torch.sigmoid(layer(y) + x).cos() + x
        return x, y


class Normalised(nn.Module):
    """A residual block of convolutions; batch norm updates running statistics, ReLU overwrites its input."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.convolutions[0](x)), inplace=True)
        y = self.norms[1](self.convolutions[1](y))
        y += x
        return F.relu(y, inplace=True)


class Kept(nn.Module):
    """Each block writes to one buffer, which the next one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            h = torch.tanh(layer(x)).sin().cos().sigmoid()
            self.mean.add_(h.detach().mean(0))
            x = x + h * self.mean.clone()
        return x


def resnet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *(Normalised() for _ in range(4)))


def regions() -> list[RegionEntry]:
    return pcr_fx.report().regions


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in model.parameters()]


def assert_same(model: nn.Module, x: Tensor, options: Any = None, training: bool = True) -> None:
    """Results, gradients and buffers are those of the model, in double precision where that is not its own."""
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="deeppcr", fullgraph=True, options={**TRACING, **(options or {})})
    found = []
    for run, module in ((compiled, model), (reference, reference)):
        torch.manual_seed(1)
        with torch.set_grad_enabled(training):
            results = run(x)
        results = results if isinstance(results, tuple) else (results,)
        if training:
            torch.stack([result.square().mean() for result in results]).sum().backward()
        found.append([*(result.detach() for result in results), *module.buffers()])
    torch.testing.assert_close(*found)
    if training:
        torch.testing.assert_close(gradients(model), gradients(reference))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[int]]] = {
    "a transformer": (Stack, (2, 5, 8), [4]),
    "with dropout": (lambda: Stack(dropout=0.3), (2, 5, 8), [4]),
    "states that are returned": (Taps, (2, 5, 8), [4]),
    "checkpointed": (Checkpointed, (2, 5, 8), [4]),
    "batch norm": (resnet, (3, 2, 6, 6), [4]),
    "two states": (TwoStates, (3, 16), [5]),
}


@pytest.mark.parametrize("name", CASES)
def test_one_body_computes_what_the_blocks_do(name: str) -> None:
    make, shape, lengths = CASES[name]
    assert_same(make().double(), torch.randn(shape, dtype=torch.float64))
    assert [region.length for region in regions()] == lengths


def test_evaluation_in_single_precision() -> None:
    assert_same(Stack().eval(), torch.randn(2, 5, 8), training=False)
    assert [region.length for region in regions()] == [4]


def test_blocks_within_autocast() -> None:
    assert_same(WithinAutocast(), torch.randn(2, 5, 8))
    assert [region.length for region in regions()] == [4]


def test_blocks_whose_parameters_are_frozen_have_a_body_of_their_own() -> None:
    model = Stack(6).double()
    for block in model.blocks[3:]:
        block.requires_grad_(False)
    assert_same(model, torch.randn(2, 5, 8, dtype=torch.float64))
    assert [region.length for region in regions()] == [3, 3]


NO_REGIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "they share what they write": (Kept, (5, 8)),
    "what is drawn would be drawn anew": (lambda: Checkpointed(dropout=0.3), (2, 5, 8)),
    "they are two": (lambda: Stack(2), (2, 5, 8)),
}


@pytest.mark.parametrize("reason", NO_REGIONS)
def test_what_is_no_region(reason: str) -> None:
    make, shape = NO_REGIONS[reason]
    assert_same(make().double(), torch.randn(shape, dtype=torch.float64))
    assert not regions()


def test_another_batch_size_and_a_dynamic_one() -> None:
    model = Stack().double()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="deeppcr", options=TRACING)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 5, 8, dtype=torch.float64)
        model.zero_grad()
        reference.zero_grad()
        results = [module(x) for module in (compiled, reference)]
        for result in results:
            result.square().sum().backward()
        torch.testing.assert_close(*results)
        torch.testing.assert_close(gradients(model), gradients(reference))
        assert [region.length for region in regions()][-1:] == [4]


def test_inductor_computes_what_the_model_does() -> None:
    """States that are returned as well, without gradients."""
    assert_same(Taps(3).double(), torch.randn(2, 5, 8).double(), {"inner_backend": "inductor"}, training=False)
    assert [region.length for region in regions()] == [3]


def test_the_option_and_backends_that_take_no_regions() -> None:
    x = torch.randn(2, 5, 8)
    seen: list[fx.GraphModule] = []

    def keeping(module: fx.GraphModule, inputs: Any) -> Any:
        seen.append(module)
        return module.forward

    for options in (
        {"inner_backend": "aot_eager"},
        {**TRACING, "inner_backend": keeping},
        {**TRACING, "inner_backend": "eager"},
    ):
        torch._dynamo.reset()
        torch.compile(Stack(), backend="deeppcr", options=options)(x)
        assert not regions()
    assert len(seen) == 1 and not list(seen[0].graph.find_nodes(op="get_attr"))


def test_the_report_says_which_blocks_have_one_body() -> None:
    torch.compile(Stack(), backend="deeppcr", options=TRACING)(torch.randn(2, 5, 8))
    (region,) = regions()
    assert region.modules == "blocks.0..3" and region.source.startswith("test_regions.py:")
    assert "scaled_dot_product_attention" in region.ops
    assert "Compiled once for all blocks" in str(pcr_fx.report()) and "blocks.0..3" in str(pcr_fx.report())
    assert pcr_fx.report().to_dict()["regions"][0]["length"] == 4


def test_an_inner_backend_that_refuses_regions_gets_the_whole_graph(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refusing(module: fx.GraphModule, inputs: Any) -> Any:
        if any(node.op == "get_attr" for node in module.graph.nodes):
            raise RuntimeError("no regions here")
        return module.forward

    monkeypatch.setattr("pcr_fx.backend.inner_backend", lambda options, mode: refusing)
    model, x = Stack(), torch.randn(2, 5, 8)
    with caplog.at_level(logging.WARNING, "pcr_fx"):
        result = torch.compile(model, backend="deeppcr", options=TRACING)(x)
    torch.testing.assert_close(result, model(x))
    assert "no regions here" in caplog.text and not regions()


def test_marked_regions_are_their_authors() -> None:
    block_of = torch.compiler.nested_compile_region(Attention.forward)

    class Marked(Stack):
        def forward(self, x: Tensor) -> Any:
            x = self.first(x)
            for block in self.blocks:
                x = block_of(block, x)
            return x

    assert_same(Marked().double(), torch.randn(2, 5, 8, dtype=torch.float64))
    assert not regions()


def test_inductor_gets_no_regions_that_have_a_backward() -> None:
    """Its backward of regions is wrong for some graphs; what it is given is looked at, and nothing is compiled."""
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        assert found_for_inductor(Stack(), x) == 1
    assert found_for_inductor(Stack(), x) == 0
    assert found_for_inductor(Stack().requires_grad_(False), x) == 1


def found_for_inductor(model: nn.Module, x: Tensor) -> int:
    """How many bodies Inductor would be given."""
    options = pcr_fx.Options(regions=True)
    assert inner.takes_regions(options)
    report = RewriteReport()

    def compile_rest(module: fx.GraphModule, inputs: Any) -> Any:
        return module.forward

    torch._dynamo.reset()
    torch.compile(model, backend=inner.Regional(compile_rest, report, inner.trains_regions(options)))(x)
    return len(report.regions)
