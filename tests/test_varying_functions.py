"""Functions with derivatives of their own that are called with another number in each block: one function, of the number too."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import assert_same, chains_of, rewritten
from fuzz.interpreted import interpreted
from torch import Tensor, nn

import pcr_fx

LENGTH = 9


class Spike(torch.autograd.Function):
    """Keeps its number on the context; what is computed of it in Python differs as well."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(v)
        ctx.width = width
        return torch.tanh(v) * math.sqrt(width)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (v,) = ctx.saved_tensors
        return g / (1 + ctx.width * v.abs()) ** 2, None


class Within(torch.autograd.Function):
    """Numbers where only such may stand, and where they meet another: bounds, a choice, an exponent."""

    @staticmethod
    def forward(v: Tensor, bound: float) -> Tensor:
        return torch.where(v.abs() < bound, v.clamp(-bound, bound), bound) ** (1 + bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.v, ctx.bound = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return torch.where(ctx.v > ctx.bound, 0.1 * ctx.bound * g, g), None


class InAList(torch.autograd.Function):
    """Numbers in a list, tensors behind them, and two results."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, numbers: list[float], *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(v, *tensors)
        ctx.numbers = numbers
        return torch.sin(v * numbers[0]) + numbers[1] * tensors[0], v * v

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        v, p = ctx.saved_tensors
        return g * ctx.numbers[1] + 3 * h * v, None, (g * p).sum(0)


class Averaged(torch.autograd.Function):
    """What it computes hangs on the size of its batch."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, width: float) -> Tensor:
        ctx.width = width * v.shape[0]
        return torch.tanh(v * width)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return g / ctx.width, None


class Branching(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, kind: str) -> Tensor:
        ctx.kind = kind
        return torch.sin(v) if kind == "sine" else torch.tanh(v)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return (2 if ctx.kind == "sine" else 3) * g, None


def in_a_list(x: Tensor, p: Tensor, t: int) -> Tensor:
    first, second = InAList.apply(x, [0.5 + 0.1 * t, 1 - 0.1 * t], p)
    return torch.tanh(first + 0.1 * second)


BLOCKS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "a number": lambda x, p, t: x * p + 0.1 * Spike.apply(x, 2 + 0.1 * t),
    "a whole number": lambda x, p, t: x * p + 0.1 * Spike.apply(x, 2 + t),
    "bounds, choices and exponents": lambda x, p, t: torch.tanh(x * p) + 0.1 * Within.apply(x.abs(), 0.2 + 0.1 * t),
    "in a list": in_a_list,
    "twice": lambda x, p, t: torch.tanh(Spike.apply(x, 1 + 0.1 * t) + Spike.apply(p * x, 3 - 0.1 * t)),
}


class Model(nn.Module):
    def __init__(self, block: Callable[[Tensor, Tensor, int], Tensor], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.block = block
        draw = torch.Generator().manual_seed(0)
        self.p = nn.ParameterList(0.4 + 0.5 * torch.rand(4, generator=draw, dtype=dtype) for _ in range(LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        for index, p in enumerate(self.p):
            x = self.block(x, p, index)
        return x


def said_of(fast: nn.Module) -> str:
    is_compiled = isinstance(fast, torch._dynamo.OptimizedModule)
    return " ".join(str(pcr_fx.report() if is_compiled else pcr_fx.report(fast)).split())


def example(batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "way"),
    [*((name, "transform") for name in BLOCKS), *((name, "compile") for name in ("a whole number", "in a list"))],
)
def test_they_are_chains_with_kernels(name: str, way: str) -> None:
    model, options = Model(BLOCKS[name]), {"planning": "estimated", "solver": "sequential"}
    with interpreted():
        fast = rewritten(model, example(), way, options)
        for batch in (3, 5):
            assert_same(fast, model, example(batch), 1e-12)
            (chain,) = chains_of(fast)
            assert chain["length"] == LENGTH
            assert chain["native_forward"] and chain["native_backward"], chain["reason"]


@pytest.mark.parametrize("solver", ["newton", "sequential"])
@pytest.mark.parametrize("name", ["bounds, choices and exponents", "in a list"])
def test_by_other_ways_and_in_single_precision(name: str, solver: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        model = Model(BLOCKS[name], dtype)
        fast = rewritten(model, example(dtype=dtype), "transform", {"solver": solver, "kernels": False})
        assert_same(fast, model, example(dtype=dtype), tolerance)
        assert [chain["length"] for chain in chains_of(fast)] == [LENGTH]


def test_what_hangs_on_sizes_is_not_read_for_those_at_hand() -> None:
    model = Model(lambda x, p, t: x * p + 0.1 * Averaged.apply(x, 2 + t))
    fast = rewritten(model, example(), "transform", {"kernels": False})
    for batch in (3, 1, 4):
        assert_same(fast, model, example(batch), 1e-12)
    assert "Averaged is called with 3 where the other blocks have 2" in said_of(fast)


@pytest.mark.parametrize("way", ["transform", "compile"])
def test_calls_that_compute_otherwise_are_told_apart(way: str) -> None:
    model = Model(lambda x, p, t: x * p + 0.1 * Branching.apply(x, "sine" if t == 0 else "tanh"))
    fast = rewritten(model, example(), way, {"kernels": False})
    assert_same(fast, model, example(), 1e-12)
    assert [chain["length"] for chain in chains_of(fast)] == [LENGTH - 1]
    said = (
        "'sine' where the other blocks have 'tanh'"
        if way == "transform"
        else "derivative of its own computes otherwise"
    )
    assert said in said_of(fast)
