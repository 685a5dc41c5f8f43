"""Truth values that are carried from block to block: done flags, refractory neurons."""

from typing import Any

import pytest
import torch
from comparison import chains_of, rewritten
from fuzz.interpreted import interpreted
from torch import Tensor, nn

import pcr_fx

LENGTH = 9


class Episodes(nn.Module):
    """A recurrence whose samples stay where they are once they are done; what is done is returned, too.

    Args:
        what: "last", "all", "rows" (a flag each sample), or "first" (the last is not read).
        start: what is done before the first block: a buffer, or computed.
    """

    def __init__(self, what: str, start: str = "computed") -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.what, self.start = what, start
        self.w = nn.Parameter(torch.randn(4, 4, generator=draw, dtype=torch.float64) / 2)
        self.p = nn.ParameterList(0.4 + torch.rand(4, generator=draw, dtype=torch.float64) for _ in range(LENGTH))
        self.register_buffer("before", torch.tensor([[True], [False], [False], [False], [False]]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        size = 1 if self.what == "rows" else 4
        done = self.before.expand(5, size) if self.start == "a buffer" else x[:, :size] > 0.6
        flags = []
        for p in self.p:
            x = torch.where(done, 0.95 * x, torch.tanh(x @ self.w + p) + 0.5 * x)
            done = done | (x[:, :size] < -0.4)
            flags.append(done)
        return x, {"last": done, "rows": done, "first": flags[0], "all": torch.stack(flags)}[self.what]


def results(model: nn.Module, x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y, done = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y, done, *torch.autograd.grad((weights * y).sum(), [x, *parameters])]


def check(model: Episodes, way: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The chains of a model that computes what it should, by one of the ways in."""
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parameters = list(model.parameters())
    fast = rewritten(model, x, way, options)
    expected = results(model, x, parameters)
    assert 0 < expected[1].sum() < expected[1].numel()
    for _ in range(2):
        torch.testing.assert_close(results(fast, x, parameters), expected, rtol=1e-10, atol=1e-10)
    return chains_of(fast)


@pytest.mark.parametrize("what", ["last", "all", "rows", "first"])
@pytest.mark.parametrize("way", ["transform", "compile"])
def test_flags_are_carried_in_kernels(what: str, way: str) -> None:
    with interpreted():
        (chain,) = check(Episodes(what), way, {"solver": "sequential", "planning": "estimated"})
    assert chain["length"] == LENGTH - (what == "first")  # where the last block does without a flag
    assert chain["native_forward"] and chain["native_backward"], chain["reason"]


@pytest.mark.parametrize("solver", ["newton", "quasi-newton", "jacobi"])
def test_flags_are_carried_by_other_solvers(solver: str) -> None:
    (chain,) = check(Episodes("all", "a buffer"), "transform", {"solver": solver, "kernels": False})
    assert (chain["length"], chain["fallbacks"]) == (LENGTH, 0)


@pytest.mark.usefixtures("kernel_cache")
def test_flags_are_carried_by_native_code() -> None:
    (chain,) = check(Episodes("last", "a buffer"), "transform", {"planning": "estimated"})
    assert chain["native_forward"] and chain["native_backward"]


def test_flags_alone_are_no_chain() -> None:
    class Alone(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            done = x[0] > 0
            for t in range(1, LENGTH):
                done = done ^ (x[t] > 0)
            return done

    x = torch.randn(LENGTH, 3)
    fast = pcr_fx.transform(Alone(), x)
    assert torch.equal(fast(x), Alone()(x))
    assert "no floating tensor" in str(fast.report)


class Counted(nn.Module):
    """A recurrence with a counter that it may read, before or after it counts."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.reads = reads
        self.w = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Of 32 bits, whole numbers are exact in double precision, and compared as such in kernels.
        dtype = torch.int32 if self.reads == "compared" else torch.long
        count, even = torch.zeros((), dtype=dtype), torch.ones(4, dtype=torch.bool)
        for _ in range(LENGTH):
            if self.reads == "after":
                count = count + 1
            if self.reads in ("before", "after"):
                x = x + torch.sin(count.to(x.dtype))
            x = torch.tanh(x @ self.w)
            x = torch.where(even if self.reads != "compared" else count > 3, x, 0.9 * x)
            even = ~even
            if self.reads != "after":
                count = count + 1
        return x, count


@pytest.mark.parametrize("reads", ["before", "after", "nothing", "compared"])
@pytest.mark.parametrize("way", ["transform", "compile"])
def test_what_no_real_number_decides_is_counted_outside(reads: str, way: str) -> None:
    model, x = Counted(reads), torch.randn(3, 4, dtype=torch.float64)
    options = {"solver": "sequential", "planning": "estimated"}
    with interpreted():
        fast = rewritten(model, x, way, options)
        for _ in range(2):
            got, expected = results(fast, x, [model.w]), results(model, x, [model.w])
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    (chain,) = chains_of(fast)
    assert chain["length"] == LENGTH
    assert chain["native_forward"] and chain["native_backward"], chain["reason"]


def test_whole_numbers_that_real_ones_decide_are_no_states() -> None:
    class Refractory(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rest = torch.zeros_like(x, dtype=torch.long)
            for _ in range(LENGTH):
                x = torch.where(rest > 0, 0.5 * x, x.sin() + 0.3)
                rest = torch.where(x > 1, 3, rest - 1)
            return x

    fast, x = pcr_fx.transform(Refractory(), torch.randn(3, 4)), torch.randn(3, 4)
    torch.testing.assert_close(fast(x), Refractory()(x))
    (miss,) = fast.report.rejected
    assert "no floating tensor but shape [3, 4] and torch.int64" in miss.reason
