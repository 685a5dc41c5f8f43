"""Truth values and whole numbers that are carried from block to block: done flags, refractory neurons, counters, tokens."""

from typing import Any

import pytest
import torch
from comparison import chains_of, rewritten
from fuzz.interpreted import interpreted
from torch import Tensor, nn

import pcr_fx

LENGTH = 9
OPTIONS = {"solver": "sequential", "planning": "estimated"}


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


class Refractory(nn.Module):
    """Neurons that rest for some steps after each spike, and how many spikes there were.

    Args:
        start: of the numbers: made of the state, or an argument.
        counts: "each" (a number for each neuron), or "all" (one, of all neurons of a sample).
    """

    def __init__(self, dtype: torch.dtype, start: str = "made", counts: str = "each") -> None:
        super().__init__()
        self.dtype, self.start, self.counts = dtype, start, counts
        self.w = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rest, spikes = torch.zeros_like(x, dtype=self.dtype), []
        count = torch.zeros_like(rest) if before is None else before
        if self.counts == "all":
            count = count[..., :1]
        for _ in range(LENGTH):
            x = torch.where(rest > 0, 0.5 * x, torch.tanh(x @ self.w) + 0.6 * x)
            spike = x > 0.9
            rest = torch.where(spike, 3, (rest - 1).clamp(min=0))
            count = count + (spike if self.counts == "each" else spike.sum(-1, keepdim=True))
            spikes.append(count)
        return x, torch.stack(spikes)


@pytest.mark.parametrize(
    ("way", "dtype", "counts"),
    [("transform", torch.int64, "each"), ("compile", torch.int32, "each"), ("compile", torch.int64, "all")],
)
def test_whole_numbers_that_real_ones_decide_are_carried(way: str, dtype: torch.dtype, counts: str) -> None:
    model, draw = Refractory(dtype, counts=counts), torch.Generator().manual_seed(1)
    with interpreted():
        fast = rewritten(model, torch.randn(3, 4, generator=draw, dtype=torch.float64), way, OPTIONS)
        for batch in (3, 5):
            x = torch.randn(batch, 4, generator=draw, dtype=torch.float64)
            expected, got = (results(run, x, [model.w]) for run in (model, fast))
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
            assert expected[1].max() >= 2
            (chain,) = chains_of(fast)
            assert chain["length"] == LENGTH - 1  # the last block does without how long neurons rest
            assert chain["native_forward"] and chain["native_backward"], chain["reason"]


@pytest.mark.parametrize("solver", ["newton", "quasi-newton"])
def test_whole_numbers_are_carried_by_other_solvers(solver: str) -> None:
    model, x = (
        Refractory(torch.int64),
        torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    )
    fast = rewritten(model, x, "transform", {"solver": solver, "kernels": False})
    torch.testing.assert_close(results(fast, x, [model.w]), results(model, x, [model.w]), rtol=1e-10, atol=1e-10)
    (chain,) = chains_of(fast)
    assert (chain["length"], chain["fallbacks"]) == (LENGTH - 1, 0)


class Tokens(nn.Module):
    """Each step reads the row of a table that the step before chose."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(14)
        shapes = {"table": (5, 4), "w": (4, 4), "out": (4, 5)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        token, tokens = torch.zeros(len(x), dtype=torch.long), []
        for _ in range(LENGTH):
            x = torch.tanh(x @ self.w + nn.functional.embedding(token, self.table))
            scores = x @ self.out
            x, token = x + 0.1 * scores[:, 1:], scores.argmax(-1)
            tokens.append(token)
        return x, torch.stack(tokens)


@pytest.mark.parametrize("way", ["transform", "compile"])
def test_tokens_that_are_fed_back_are_carried(way: str) -> None:
    model, x = Tokens(), torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with interpreted():
        fast = rewritten(model, x, way, OPTIONS)
        got, expected = (results(run, x, list(model.parameters())) for run in (fast, model))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert len(expected[1].unique()) > 2
    (chain,) = chains_of(fast)
    assert chain["length"] >= LENGTH - 1
    assert chain["native_forward"] and chain["native_backward"], chain["reason"]


def test_whole_numbers_that_may_be_large_are_no_states() -> None:
    model, x = (
        Refractory(torch.int64),
        torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    )
    before = torch.full((3, 4), 2**60 + 1)
    fast = pcr_fx.transform(model, (x, before), OPTIONS)
    assert torch.equal(fast(x, before)[1], model(x, before)[1])
    reasons = [miss.reason for miss in fast.report.rejected]
    assert any("carries, torch.int64, may not be exact as torch.float64" in reason for reason in reasons)


def test_how_large_they_get_may_hang_on_sizes() -> None:
    """What is counted of all neurons, however many there are in another call."""

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            count = torch.zeros_like(x[:, :1], dtype=torch.long)
            for _ in range(LENGTH):
                x = torch.sin(1.5 * x) + 0.1 * (count % 2 == 0).to(x.dtype)
                count = count + (x > -9).sum(-1, keepdim=True)
            return x, count

    model, draw = Counting(), torch.Generator().manual_seed(1)
    fast = pcr_fx.transform(model, torch.randn(3, 4, generator=draw, dtype=torch.float64), OPTIONS)
    for width in (4, 40):
        x = torch.randn(3, width, generator=draw, dtype=torch.float64)
        torch.testing.assert_close(results(fast, x, []), results(model, x, []), rtol=1e-12, atol=1e-12)
