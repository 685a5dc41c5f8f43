"""Which chains are found in which models, in both dialects, and why the others are not."""

import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparison import assert_same
from models import ResidualBlock, ResidualNet, plain_mlp
from torch import Tensor, nn

import pcr_fx
from pcr_fx.passes.periods import _candidate_periods, find_runs

# In PyTorch's ops; test_kernels.py and test_native_newton.py have native code.
NEWTON = {"solver": "newton", "kernels": False}


class Loop(nn.Module):
    """Calls `step(module, index, x)` for each of `blocks`."""

    def __init__(self, blocks: list[nn.Module], step: Callable[..., Tensor]) -> None:
        super().__init__()
        self.blocks, self.step = nn.ModuleList(blocks), step

    def forward(self, x: Tensor) -> Any:
        for index, block in enumerate(self.blocks):
            x = self.step(block, index, x)
        return x


def linears(count: int, width: int = 4) -> list[nn.Module]:
    return [nn.Linear(width, width) for _ in range(count)]


def sequence(*parts: list[nn.Module]) -> nn.Module:
    return nn.Sequential(*(module for part in parts for module in part))


class Functional(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4) / 4) for _ in range(length)])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x + torch.tanh(x @ weight) * 0.1
        return x


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = ResidualBlock(4)

    def forward(self, x: Tensor) -> Tensor:
        for step in range(20):
            x = self.cell(x) * (1 - 0.01 * step)
        return x


class Taps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ResidualBlock(4) for _ in range(12)])

    def forward(self, x: Tensor) -> Tensor:
        states = []
        for block in self.blocks:
            x = block(x)
            states.append(x)
        return torch.stack(states, 1).flatten(1) + states[5].sum()


class Recurrent(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 4)
        outputs = []
        for t in range(12):
            state = self.cell(x[:, t : t + 2], state)
            outputs.append(state)
        return torch.stack(outputs, 1).flatten(1)


class Momentum(nn.Module):
    """A second-order recurrence: each state is made of the two before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linears(14))

    def forward(self, x: Tensor) -> Tensor:
        before, now = x, x * 0.5
        for layer in self.layers:
            before, now = now, 1.8 * now - 0.85 * before + 0.1 * torch.tanh(layer(now))
        return now


def dotted_relu() -> nn.Module:
    return sequence(*[[nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(inplace=True)] for _ in range(10)])


def scaled(block: nn.Module, index: int, x: Tensor) -> Tensor:
    return x + (0.1 + 0.01 * index) * torch.tanh(block(x))


def accumulated(block: nn.Module, index: int, x: Tensor) -> Tensor:
    y = block(x)
    y += x
    return torch.tanh(y)


POSITIVE: dict[str, tuple[Callable[[], nn.Module], int, list[int]]] = {
    "residual": (lambda: ResidualNet(12), 3, [12]),
    "plain layers": (lambda: plain_mlp(15), 4, [15]),
    "starts mid-pattern": (
        lambda: sequence([nn.Linear(3, 4), nn.Tanh()], list(plain_mlp(10)), [nn.Linear(4, 2)]),
        3,
        [10],
    ),
    "functional": (lambda: Functional(12), 4, [12]),
    "numbers that differ": (lambda: Loop(linears(11), scaled), 4, [11]),
    "written in place": (lambda: Loop(linears(11), accumulated), 4, [11]),
    "norm and in-place activation": (dotted_relu, 4, [10]),
    "shared weights": (Shared, 4, [20]),
    "two chains of different width": (
        lambda: sequence(list(plain_mlp(9)), [nn.Linear(4, 6)], list(plain_mlp(8, 6))),
        4,
        [9, 8],
    ),
    "interrupted": (lambda: sequence(list(plain_mlp(9)), [nn.Linear(4, 4), nn.ReLU()], list(plain_mlp(9))), 4, [9, 9]),
    "alternating": (
        lambda: sequence(*[[nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid()] for _ in range(9)]),
        4,
        [9],
    ),
    "taps": (Taps, 4, [12]),
    "GRU": (lambda: Recurrent(nn.GRUCell(2, 4)), 13, [12]),
    "RNN": (lambda: Recurrent(nn.RNNCell(2, 4)), 13, [12]),
    "momentum": (Momentum, 4, [14]),
}


@pytest.mark.parametrize("name", POSITIVE)
def test_found_in_both_dialects_and_right(name: str) -> None:
    make, size, lengths = POSITIVE[name]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(3, size, dtype=torch.float64)
    fast = pcr_fx.transform(model, x, NEWTON)
    assert [chain["length"] for chain in fast.report.to_dict()["chains"]] == lengths, str(fast.report)
    assert_same(fast, model, x, 1e-9)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="deeppcr", options={**NEWTON, "inner_backend": "aot_eager"})
    assert_same(compiled, model, x, 1e-9)
    assert [chain["length"] for chain in pcr_fx.report().to_dict()["chains"]] == lengths, str(pcr_fx.report())


class Written(nn.Module):
    """Writes to a state that is read again, by way of a view of a kind that is not followed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linears(10))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = torch.tanh(layer(x))
            view = y.view(-1)[0]
            y.mul_(0.5)
            x = y + view
        return x


def noisy(block: nn.Module, index: int, x: Tensor) -> Tensor:
    return x + 0.1 * block(torch.bernoulli(torch.sigmoid(x)))


NEGATIVE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (
        lambda: sequence(*[[nn.Linear(4, 4), nn.AlphaDropout(0.5)] for _ in range(10)]),
        "random op alpha_drop",
    ),
    "noise": (lambda: Loop(linears(10), noisy), "random op bernoulli"),
    "written": (Written, "mutation"),
    "too short": (lambda: plain_mlp(5), "too short: 5 blocks, min_length=8"),
}


@pytest.mark.parametrize("name", NEGATIVE)
def test_near_misses_are_left_alone_with_their_reason(name: str) -> None:
    make, reason = NEGATIVE[name]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(3, 4, dtype=torch.float64)
    fast = pcr_fx.transform(model, x, NEWTON)
    assert not fast.report.chains
    rejected = fast.report.to_dict()["rejected"]
    assert any(re.search(reason, miss["reason"]) for miss in rejected), rejected
    torch.manual_seed(1)
    got = fast(x)
    torch.manual_seed(1)
    torch.testing.assert_close(got, model(x))


def test_the_odd_block_is_named() -> None:
    model = ResidualNet(21)
    model.blocks[10] = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    report = pcr_fx.transform(model, torch.randn(2, 3), NEWTON).report.to_dict()
    assert [chain["modules"] for chain in report["chains"]] == ["blocks.0..9", "blocks.11..20"]
    (odd,) = report["rejected"]
    assert odd["modules"] == "blocks.10"
    assert odd["reason"] == "ends the chain blocks.0..9: relu stands where the other blocks have tanh"


def test_another_activation_is_named() -> None:
    model = plain_mlp(20)
    model[21] = nn.ReLU()
    (odd,) = pcr_fx.transform(model, torch.randn(2, 4), NEWTON).report.to_dict()["rejected"]
    assert odd["reason"] == "ends the chain 0..19: relu stands where the other blocks have tanh"


def test_blocks_of_other_shapes_are_near_misses() -> None:
    model = nn.Sequential(*(layer for n in range(4, 16) for layer in (nn.Linear(n, n + 1), nn.Tanh())))
    (miss,) = pcr_fx.transform(model, torch.randn(2, 4), NEWTON).report.to_dict()["rejected"]
    assert "blocks of the same ops that differ: linear takes" in miss["reason"]
    assert "shape [2, 5]" in miss["reason"]


def test_the_block_before_a_chain_is_named() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(n, 4), nn.Tanh()) for n in [3, *[4] * 10]))
    (miss,) = pcr_fx.transform(model, torch.randn(2, 3), NEWTON).report.to_dict()["rejected"]
    assert miss["reason"].startswith("stands before 1..10: linear takes")


def test_marked_regions_are_looked_into() -> None:
    class Marked(ResidualBlock):
        forward = torch.compiler.nested_compile_region(ResidualBlock.forward)

    model = nn.Sequential(*(Marked(4) for _ in range(10))).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    compiled = torch.compile(model, backend="deeppcr", options={**NEWTON, "inner_backend": "eager"})
    assert_same(compiled, model, x, 1e-9)
    assert [chain["length"] for chain in pcr_fx.report().to_dict()["chains"]] == [10]


def test_states_of_several_lags() -> None:
    class Lags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([torch.randn(4, 4) / 3 for _ in range(10)])

        def forward(self, x: Tensor) -> Tensor:
            older, first, second = x, x * 0.5, x
            for weight in self.weights:
                older, first = first, torch.tanh(second + 0.5 * older)
                second = torch.sin((second + older) @ weight)
            return second

    model, x = Lags().double(), torch.randn(2, 4, dtype=torch.float64)
    fast = pcr_fx.transform(model, x, NEWTON)
    assert [chain["length"] for chain in fast.report.to_dict()["chains"]] == [9]
    assert_same(fast, model, x, 1e-9)


def test_a_value_drawn_for_the_next_block() -> None:
    class Drawn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            noise = torch.zeros_like(x)
            for _ in range(10):
                x = torch.tanh(x + noise)
                noise = torch.randn_like(x)
            return x * noise

    model, x = Drawn(), torch.randn(2, 4, dtype=torch.float64)
    fast = pcr_fx.transform(model, x, NEWTON)
    assert [chain["length"] for chain in fast.report.to_dict()["chains"]] == [9]
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(fast(x), expected)


def test_noise_has_the_shape_of_what_it_is_added_to() -> None:
    """Also in a call whose inputs no longer look alike."""

    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.sum() + y + torch.randn_like(y)

    model, x = Two(), torch.randn(2, 3)
    fast = pcr_fx.transform(model, (x, x.clone()))
    for y in (torch.randn(2, 3), torch.randn(4, 3)):
        torch.manual_seed(0)
        expected = model(x, y)
        torch.manual_seed(0)
        torch.testing.assert_close(fast(x, y), expected)


def test_a_buffer_written_within_the_blocks() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([torch.randn(4) for _ in range(10)])

        def forward(self, x: Tensor) -> Tensor:
            for weight in self.weights:
                scaled = weight * 2
                scaled.add_(1.0)
                x = torch.tanh(x + scaled)
            return x

    model, x = Written().double(), torch.randn(2, 4, dtype=torch.float64)
    assert_same(pcr_fx.transform(model, x, NEWTON), model, x, 1e-9)


def test_an_operand_of_another_shape_ends_a_chain() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shifts = nn.ParameterList([nn.Parameter(torch.randn(4 if i < 9 else 1)) for i in range(18)])

        def forward(self, x: Tensor) -> Tensor:
            for shift in self.shifts:
                x = torch.tanh(x + shift)
            return x

    model, x = Wide().double(), torch.randn(2, 4, dtype=torch.float64)
    fast = pcr_fx.transform(model, x, NEWTON)
    assert [chain["length"] for chain in fast.report.to_dict()["chains"]] == [9, 9]
    assert_same(fast, model, x, 1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_random_chains_with_one_thing_changed(seed: int) -> None:
    """Rewritten or not, the result is that of the model."""
    generator = torch.Generator().manual_seed(seed)

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    length, odd, change = 10 + draw(8), 2 + draw(6), draw(8)
    activations = [torch.tanh, torch.sigmoid, F.relu, F.gelu]
    usual, other = activations[draw(4)], activations[draw(4)]

    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(linears(length))
            self.gains = nn.ParameterList([nn.Parameter(torch.rand(4)) for _ in range(length)])

        def forward(self, x: Tensor) -> Tensor:
            kept: list[Tensor] = []
            for index, (layer, gain) in enumerate(zip(self.layers, self.gains, strict=True)):
                here = index == odd
                hidden = layer(x)
                if here and change == 0:
                    kept.append(hidden)
                if here and change == 1:
                    hidden.add_(1.0)
                y = (other if here and change == 2 else usual)(hidden)
                y = gain * y if not (here and change == 3) else y * gain
                if here and change == 4:
                    kept.append(x[:, 1:])
                scale = 0.3 if not (here and change == 5) else -0.2
                previous = x
                x = x + scale * y if not (here and change == 6) else y - scale * x
                if here and change == 7:
                    x.mul_(0.5)
                    kept.append(previous.t())
            return x + sum(k.sum() for k in kept)

    torch.manual_seed(seed)
    model, x = Changed().double(), torch.randn(3, 4, dtype=torch.float64)
    fast = pcr_fx.transform(model, x, NEWTON)
    assert_same(fast, model, x, 1e-9)
    # A write to a state may be seen by the blocks after it, so that none of them is taken.
    assert fast.report.chains or length - odd - 1 < 8 or change == 7


def test_a_run_is_found_among_many_that_are_accidents() -> None:
    draw = random.Random(0)
    noise = [draw.randrange(8) for _ in range(60_000)]
    block = [draw.randrange(8) for _ in range(37)]
    sequence = [*noise[:20_000], *(block * 9), *noise[20_000:]]
    runs = [run for run in find_runs(sequence, 8) if run.period == 37]
    assert any(run.start <= 20_000 and run.stop >= 20_000 + 9 * 37 for run in runs)
    # Each candidate costs a pass over the sequence: they must stay few, whatever its length.
    assert len(_candidate_periods(np.array(sequence), 8)) < 200


def test_a_state_that_lives_in_an_input_is_named_with_advice() -> None:
    class Written(nn.Module):
        def forward(self, out: Tensor) -> Tensor:
            for t in range(20):
                out[:, t + 1] = out[:, t] + 0.1 * (0.5 - out[:, t])
            return out

    model, x = Written(), torch.rand(3, 21, dtype=torch.float64)
    fast = pcr_fx.transform(model, x, NEWTON)
    assert not fast.report.chains
    (miss,) = fast.report.rejected
    assert miss.length == 20 and "writes to out" in miss.reason and "variable of its own" in miss.reason


def test_what_is_written_once_before_the_blocks_or_behind_them() -> None:
    class Filled(nn.Module):
        def forward(self, x: Tensor, source: Tensor) -> Tensor:
            source[0] = 0.5
            for _ in range(12):
                x = torch.tanh(x * 0.3 + source)
            source.mul_(2)
            return x + source

    model, x = Filled(), torch.randn(4, dtype=torch.float64)
    fast = pcr_fx.transform(model, (x, x), NEWTON)
    (entry,) = fast.report.chains
    assert entry.chain.length == 12
    given = [torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)]
    results = [run(x, source) for run, source in zip((fast, model), given, strict=True)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*given)
