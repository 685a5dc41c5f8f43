"""What people write inside a block: the chain is found and has a kernel both ways, and computes what the model does."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from comparison import value_and_gradients
from torch import Tensor, nn

import pcr_fx
from pcr_fx.graphs.effects import dropout_noise

pytestmark = pytest.mark.usefixtures("kernel_cache")
LENGTH = 12


class Model(nn.Module):
    """`block(x, p, i)` for each of some parameters `[4]`, with the number of the block."""

    def __init__(self, block: Callable[..., Tensor]) -> None:
        super().__init__()
        self.block = block
        draw = torch.Generator().manual_seed(0)
        self.p = nn.ParameterList(0.4 + 0.5 * torch.rand(4, generator=draw, dtype=torch.float64) for _ in range(LENGTH))
        self.register_buffer("done", torch.arange(LENGTH * 3).view(LENGTH, 3, 1) % 5 == 0)
        self.register_buffer("small", (torch.arange(LENGTH * 4).view(LENGTH, 4) % 3).to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        for index, p in enumerate(self.p):
            x = self.block(self, x, p, index)
        return x


def matrix(x: Tensor) -> Tensor:
    return 2 * torch.eye(2, dtype=x.dtype) + 0.1 * x.view(-1, 2, 2)


def definite(x: Tensor) -> Tensor:
    return matrix(x) @ matrix(x).mT


def components(_: Model, x: Tensor, p: Tensor, index: int) -> Tensor:
    a, b = x[..., 0], x[..., 1]
    return x + 0.1 * torch.stack([a * b, b - a, x[..., 2], x[..., -1]], -1) * p


BLOCKS: dict[str, Callable[..., Tensor]] = {
    "components": components,
    "steps": lambda m, x, p, i: x + torch.cat([x[:, ::2], x[:, 1::2]], 1) * p,
    "a roll": lambda m, x, p, i: torch.tanh(torch.roll(x, 1, -1) * p),
    "a constant list": lambda m, x, p, i: torch.tanh(x[:, [2, 0, 3, 1]] * p),
    "a stencil": lambda m, x, p, i: torch.tanh(F.conv1d(x[:, None], p[None, None, :3], padding=1)[:, 0]),
    "the largest": lambda m, x, p, i: (
        x * p + 0.1 * x.max(-1, keepdim=True).values + x.argmax(-1, True).to(x.dtype) * 0.01
    ),
    "the third in order": lambda m, x, p, i: torch.tanh(x * p + x.kthvalue(3, -1, True).values),
    "shrunk": lambda m, x, p, i: F.softshrink(x, 0.1) * p + F.hardshrink(x, 0.3),
    "another's sign": lambda m, x, p, i: 0.5 * torch.copysign(p, x) + 0.3 * x,
    "a length": lambda m, x, p, i: 0.5 * torch.hypot(x, p),
    "in order": lambda m, x, p, i: x.sort(-1).values * p,
    "a cumulative sum": lambda m, x, p, i: torch.tanh(x.cumsum(-1) * p),
    "a diagonal": lambda m, x, p, i: x @ (torch.eye(4, dtype=x.dtype) + 0.1 * torch.diag(p)),
    "done flags": lambda m, x, p, i: torch.where(m.done[i], torch.zeros_like(x), x + p),
    "a mask": lambda m, x, p, i: (x * p).masked_fill(m.done[i], 0.5),
    "small whole numbers": lambda m, x, p, i: x * p + 0.1 * m.small[i].to(x.dtype),
    "prelu": lambda m, x, p, i: F.prelu(x, p[:1]) + 0.1,
    "an inverse": lambda m, x, p, i: torch.linalg.inv(matrix(x)).reshape(-1, 4) * p,
    "a solve": lambda m, x, p, i: x * p + 0.1 * torch.linalg.solve(matrix(x), p[:2].expand(x.shape[0], 2)).repeat(1, 2),
    "a Cholesky factor": lambda m, x, p, i: x * p + 0.1 * torch.linalg.cholesky(definite(x)).reshape(-1, 4),
    "a determinant": lambda m, x, p, i: x * p + 0.1 * torch.linalg.det(matrix(x))[:, None],
    "a log determinant": lambda m, x, p, i: x * p + 0.1 * torch.logdet(definite(x))[:, None],
}


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    return value_and_gradients(model, list(model.parameters()), x)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block(name: str) -> None:
    model, x = Model(BLOCKS[name]), torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fast = pcr_fx.transform(model, x, options={"planning": "estimated"})
    for got, expected in zip(gradients(fast, x), gradients(model, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    (chain,) = fast.report.to_dict()["chains"]
    assert chain["length"] == LENGTH
    assert chain["native_forward"] and chain["native_backward"], str(fast.report)


@pytest.mark.parametrize("name", ["an inverse", "a solve", "a Cholesky factor"])
@pytest.mark.parametrize("solver", ["newton", "sequential"])
def test_a_block_by_other_solvers(name: str, solver: str) -> None:
    model, x = Model(BLOCKS[name]), torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fast = pcr_fx.transform(model, x, options={"solver": solver})
    for got, expected in zip(gradients(fast, x), gradients(model, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda a: torch.linalg.inv(a), "singular"),
        (lambda a: a.inverse(), "singular"),
        (lambda a: torch.linalg.solve(a, a), "singular"),
        (lambda a: torch.linalg.cholesky(a), "positive-definite"),
    ],
    ids=["inv", "inverse", "solve", "cholesky"],
)
def test_what_raises_in_the_model_raises(operation: Callable[[Tensor], Tensor], message: str) -> None:
    def block(_: Model, x: Tensor, p: Tensor, index: int) -> Tensor:
        return x * p + operation(x.view(-1, 2, 2)).reshape(-1, 4)

    model = Model(block)
    good = torch.tensor([[2.0, 0.5, 0.5, 1.0]], dtype=torch.float64)
    fast = pcr_fx.transform(model, good, options={"planning": "estimated"})
    torch.testing.assert_close(fast(good), model(good), rtol=1e-12, atol=1e-12)
    bad = torch.tensor([[1.0, 2.0, 2.0, 4.0], [1.0, 2.0, 2.0, 1.0]], dtype=torch.float64)
    for either in (model, fast):
        with pytest.raises(torch.linalg.LinAlgError, match=message):
            either(bad)


@pytest.mark.parametrize("dropout", [F.dropout, F.dropout1d], ids=["dropout", "dropout1d"])
@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("way_in", ["transform", "compile"])
def test_dropout_draws_what_the_model_draws(dropout: Callable[..., Tensor], p: float, way_in: str) -> None:
    """Values, gradients and the state of the generator afterwards; noise between and after the blocks too."""

    def block(_: Model, x: Tensor, weight: Tensor, index: int) -> Tensor:
        return torch.tanh(weight + dropout(x, p, True) * torch.rand_like(x))

    class Ends(Model):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(F.dropout(x, 0.5, True)), 0.5, True)

    model, x = Ends(block), torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if way_in == "transform":
        fast = pcr_fx.transform(model, x)
    else:
        fast = torch.compile(model, backend="deeppcr", options={"inner_backend": "eager"})
    for seed in range(3):
        results, states = [], []
        for either in (fast, model):
            torch.manual_seed(seed)
            y = either(x)
            gradients = torch.autograd.grad(y.sum(), list(model.parameters()))
            results.append([y, *gradients])
            states.append(torch.get_rng_state())
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(*states)
    report = pcr_fx.report(fast) if way_in == "transform" else pcr_fx.report()
    assert [chain["length"] for chain in report.to_dict()["chains"]] == [LENGTH]


@pytest.mark.parametrize("name", ["dropout", "dropout1d", "dropout2d", "dropout3d"])
@pytest.mark.parametrize("p", [0.2, 1.0])
def test_noise_is_what_dropout_multiplies_by(name: str, p: float) -> None:
    x = torch.randn(2, 3, 4, 5, 6)[(0,) * (3 - int(name[7:8] or 3))]
    torch.manual_seed(0)
    expected = getattr(F, name)(x, p, True)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    torch.testing.assert_close(x * dropout_noise(x, p, name), expected, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


class Whole(Model):
    """With whole numbers of many kinds, and tables of many rows."""

    def __init__(self, block: Callable[..., Tensor]) -> None:
        super().__init__(block)
        draw = torch.Generator().manual_seed(3)
        self.table = nn.Parameter(torch.rand(1000, 4, generator=draw, dtype=torch.float64))
        self.embedding = nn.Embedding(500, 4, padding_idx=3).double()
        self.register_buffer("steps", torch.arange(0, 20 * LENGTH, 20))
        self.register_buffer("tokens", torch.randint(0, 500, (3, LENGTH), generator=draw))
        self.register_buffer("order", torch.stack([torch.randperm(4, generator=draw) for _ in range(LENGTH)]))
        for index in range(LENGTH):
            self.register_buffer(f"own{index}", torch.tensor(7 * index))
            self.register_buffer(f"flag{index}", torch.tensor([index % 2 == 0, True, False, index % 3 == 0]))


WHOLE: dict[str, Callable[..., Tensor]] = {
    "a time embedding": lambda m, x, p, i: torch.tanh(x * p + m.embedding(m.steps[i])),
    "tokens": lambda m, x, p, i: torch.tanh(x * p + m.embedding(m.tokens[:, i])),
    "tokens in turn, backwards": lambda m, x, p, i: torch.tanh(x * p + m.embedding(m.tokens[:, LENGTH - 1 - i])),
    "rows of a parameter": lambda m, x, p, i: torch.tanh(x * p + m.table[m.steps[i : i + 1]]),
    "rows for each sample": lambda m, x, p, i: torch.tanh(x * p + m.table[m.tokens[:, i]]),
    "places computed": lambda m, x, p, i: torch.tanh(x * p + m.embedding(m.steps[i] // 2 + 1)),
    "times as reals": lambda m, x, p, i: torch.tanh(x * p + torch.sin(m.steps[i].to(x.dtype) * p)),
    "whole and real": lambda m, x, p, i: torch.tanh(x * p + 0.1 * (x * m.steps[i])),
    "a choice of features": lambda m, x, p, i: torch.tanh(x * p).gather(1, m.order[i].expand(x.shape[0], 4)),
    "an order of features": lambda m, x, p, i: torch.tanh(x * p)[:, m.order[i]],
    "compared": lambda m, x, p, i: torch.where(m.order[i] > 1, x * p, x + 0.1),
    "buffers of each block": lambda m, x, p, i: torch.tanh(x * p + m.embedding(getattr(m, f"own{i}"))),
    "numbers of each block": lambda m, x, p, i: torch.tanh(x * p + 0.01 * getattr(m, f"own{i}")),
    "flags of each block": lambda m, x, p, i: torch.where(getattr(m, f"flag{i}"), x * p, x + 0.1),
}


NO_KERNEL = {
    "a choice of features": "may not be",
    "an order of features": "an index that may be out of range",
    "compared": "may not be",
    "numbers of each block": "of torch.float32 beside torch.float64",
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("way", ["transform", "compile"])
def test_whole_numbers(name: str, way: str) -> None:
    model, x = Whole(WHOLE[name]), torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if way == "transform":
        fast: nn.Module = pcr_fx.transform(model, x, options={"planning": "estimated"})
    else:
        torch._dynamo.reset()
        fast = torch.compile(model, backend="deeppcr", options={"planning": "estimated", "inner_backend": "eager"})
    for _ in range(2):
        for got, expected in zip(gradients(fast, x), gradients(model, x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    report = pcr_fx.report(fast) if way == "transform" else pcr_fx.report()
    (chain,) = report.to_dict()["chains"]
    assert chain["length"] == LENGTH
    if name in NO_KERNEL:
        assert NO_KERNEL[name] in str(report)
    else:
        assert chain["native_forward"] and chain["native_backward"], str(report)


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "a path dropped": lambda x: x * x.new_empty(x.shape[0], 1).bernoulli_(0.9).div_(0.9),
    "a path dropped by a floor": lambda x: x.div(0.9) * (0.9 + torch.rand((x.shape[0], 1), dtype=x.dtype)).floor_(),
    "normal in place": lambda x: x + 0.1 * torch.empty_like(x).normal_(0.5, 2.0),
    "uniform in place": lambda x: x + 0.1 * torch.zeros_like(x).uniform_(-1, 1),
    "exponential in place": lambda x: x + 0.1 * x.new_zeros(4).exponential_(),
    "dropout in place": lambda x: F.dropout(x * 1.0, 0.3, True, True),
    "a mask": lambda x: x.masked_fill(torch.rand_like(x) < 0.3, 0.0),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("way", ["transform", "compile"])
def test_noise_drawn_in_place_is_the_models(name: str, way: str) -> None:
    """Values, gradients, and the state of the generator afterwards, for other batch sizes too."""

    class Ends(Model):
        def forward(self, x: Tensor) -> Tensor:
            return torch.rand_like(x).normal_() * super().forward(x * torch.empty_like(x).normal_())

    model = Ends(lambda m, x, p, i: torch.tanh(p + DRAWS[name](x)))
    options = {"planning": "estimated", "kernels": False, "solver": "sequential"}
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if way == "transform":
        fast: nn.Module = pcr_fx.transform(model, x, options=options)
    else:
        torch._dynamo.reset()
        fast = torch.compile(model, backend="deeppcr", options={**options, "inner_backend": "eager"})
    for batch in (5, 3):
        results, states = [], []
        for either in (fast, model):
            torch.manual_seed(batch)
            results.append(gradients(either, x[:batch]))
            states.append(torch.get_rng_state())
        torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)
        assert torch.equal(*states)
        report = pcr_fx.report(fast) if way == "transform" else pcr_fx.report()
        if batch == 5:
            assert [chain["length"] for chain in report.to_dict()["chains"]] == [LENGTH], str(report)
