"""What writes into fresh memory becomes ordinary ops that compute the same, whatever is written and read in which order."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import assert_same
from torch import Tensor, fx, nn

import pcr_fx
from pcr_fx.graphs.effects import writes
from pcr_fx.passes.capture import capture_model
from pcr_fx.passes.writes import write_out

SHAPE = (4, 3, 2)


class Model(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.run(x) if y is None else self.run(x, y)


def written_out(run: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    model = Model(run)
    graph = capture_model(model, inputs).graph
    write_out(graph)
    graph.lint()
    return fx.GraphModule(model, graph)


def check(run: Callable[..., Any], *inputs: Tensor, stays: bool = False) -> fx.GraphModule:
    """The graph without its writes computes what `run` does, with its gradients, and leaves the inputs as `run` does."""
    graph = written_out(run, *inputs)
    assert any(map(writes, graph.graph.nodes)) is stays
    results = []
    for function in (run, graph):
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        given = [leaf * 1 for leaf in leaves]
        flat: list[Any] = torch.utils._pytree.tree_leaves(function(*given))
        moving = [one for one in flat if one.requires_grad]
        total = sum((one * torch.linspace(-1, 1, one.numel(), dtype=one.dtype).view(one.shape)).sum() for one in moving)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = torch.autograd.grad(total, wanted, allow_unused=True) if moving else ()  # type: ignore[arg-type]
        results.append([*flat, *given, *(torch.zeros(()) if g is None else g for g in gradients)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    return graph


def random_index(rng: random.Random, shape: tuple[int, ...]) -> Any:
    items: list[Any] = []
    for size in shape[: rng.randint(1, len(shape))]:
        kind = rng.random()
        if kind < 0.5:
            items.append(rng.randrange(-size, size))
        elif kind < 0.75:
            start = rng.randrange(size)
            items.append(slice(start, rng.randint(start + 1, size)))
        else:
            items.append(slice(None))
    if len(items) < len(shape) and rng.random() < 0.2:
        items.append(...)
    return tuple(items) if len(items) > 1 or rng.random() < 0.5 else items[0]


def random_program(seed: int) -> Callable[..., Any]:
    """Writes to two buffers and views of them, and reads of them in between."""

    def run(x: Tensor, y: Tensor) -> Any:
        rng = random.Random(seed)
        buffers = [torch.zeros(SHAPE, dtype=torch.float64), x.clone()]
        views, values = list(buffers), [x, y]
        for _ in range(rng.randint(2, 10)):
            view = rng.choice(views)
            if view.dim() == 0:
                view = buffers[0]
            index, kind = random_index(rng, tuple(view.shape)), rng.random()
            part = view[index]
            if kind < 0.3:
                # A row of the right shape, one to be spread, or a number.
                value = rng.choice([part.sum() * 0.5, rng.choice(values).sum(), 2.5, part.sin()])
                view[index] = value
            elif kind < 0.45:
                part.mul_(rng.choice([2, 0.5]))
            elif kind < 0.6:
                view[index] += rng.choice([1, values[0].mean()])
            elif kind < 0.7:
                part.copy_(part.exp())
            elif kind < 0.8:
                part.fill_(3) if rng.random() < 0.5 else part.zero_()
            elif kind < 0.9:
                views.append(part)
            elif kind < 0.95:
                values.append(part.cos())
            elif len(buffers) < 4:
                buffers.append(part.clone() if part.dim() > 1 else buffers[-1] * 2)
                views.append(buffers[-1])
        return [value * 1 for value in (*buffers, *views, *values)]

    return run


@pytest.mark.parametrize("first", range(0, 100, 25))
def test_random_writes(first: int) -> None:
    """Gradients where eager has them: it refuses some for what was written between a forward and its backward."""
    torch.manual_seed(0)
    inputs = torch.randn(SHAPE, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    for seed in range(first, first + 25):
        run = random_program(seed)
        graph = written_out(run, *inputs)
        torch.testing.assert_close(graph(*inputs), run(*inputs), rtol=1e-12, atol=1e-12)


def rows(x: Tensor) -> Tensor:
    out = torch.zeros(5, 3, dtype=x.dtype)
    for t in range(5):
        out[t] = x * (t + 1)
    return out


def reversed_columns(x: Tensor) -> Tensor:
    out = x.new_zeros(3, 5)
    for t in reversed(range(5)):
        out[:, t] = x * t
    return out


def partly(x: Tensor) -> Tensor:
    out = torch.ones(7, 3, dtype=x.dtype)
    for t in range(2, 5):
        out[t, ...] = x + t
    return out


def state_in_the_result(x: Tensor) -> Tensor:
    out = torch.zeros(6, 3, dtype=x.dtype)
    out[0] = x
    for t in range(5):
        out[t + 1] = 0.5 * out[t].view(3) + 1
    return out


def slices(x: Tensor) -> Tensor:
    out = torch.empty(2, 9, dtype=x.dtype)
    for t in range(3):
        out[:, 3 * t : 3 * t + 3] = x + t
    return out


def grid(x: Tensor) -> Tensor:
    u = torch.zeros(3, 4, dtype=x.dtype)
    for i in range(1, 3):
        for j in range(1, 4):
            u[i, j] += x[j - 1] * u[i - 1, j - 1] + i
    return u


def copies_of_what_was_written(x: Tensor) -> Tensor:
    for _ in range(3):
        x = x.clone().mul_(0.7)
        x.mul_(0.9)
    return x


def masked(x: Tensor) -> Tensor:
    h = x.clone()
    h[x > 0] = 0
    h.masked_fill_(x < -1, 5.0)
    return h * x


def masked_as_far_as_it_goes(x: Tensor) -> Tensor:
    """What only takes its shape of the memory is no view of it."""
    h = x.clone()
    h[(x.sum(-1, keepdim=True) > 0).expand_as(h)] = 0.5
    return h * x


def of_other_types(x: Tensor) -> tuple[Tensor, Tensor]:
    counts, flags = torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3, dtype=torch.bool)
    for t in range(4):
        counts[t] = x * t
        flags[t] = x > t / 4
    return counts, flags


def by_whole_numbers(x: Tensor) -> Tensor:
    """As couplings of normalising flows put their halves together."""
    first, rest = torch.tensor([1, 0]), torch.tensor([-1])
    out = torch.empty(2, 3, dtype=x.dtype)
    out[:, first] = x[:2].sin()
    out[..., rest] = 2
    out[first] = out[first] * x
    return out * 2


def by_whole_numbers_of_other_types(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values are converted to what they are written into; a number twice is written once."""
    counts, out = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 3, dtype=torch.float32)
    counts[torch.tensor([0])] = 2.7
    counts[:, torch.tensor([1, 1])] = 5
    out[torch.tensor([2, 0])] = x * 2
    return counts, out


def two_names(x: Tensor) -> list[Tensor]:
    out = torch.zeros(2, 3, dtype=x.dtype)
    view, early = out[0], out.sum(0)
    out[0] = x
    view += 1
    return [out * 1, view * 2, early]


@pytest.mark.parametrize(
    "run",
    [
        rows,
        reversed_columns,
        partly,
        state_in_the_result,
        slices,
        copies_of_what_was_written,
        masked,
        masked_as_far_as_it_goes,
        of_other_types,
        by_whole_numbers,
    ],
)
def test_writes_of_many_kinds(run: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    check(run, torch.randn(3, dtype=torch.float64))


@pytest.mark.parametrize("run", [two_names, grid])
def test_writes_that_eager_has_no_gradient_of(run: Callable[..., Any]) -> None:
    x = torch.randn(3, dtype=torch.float64)
    graph = written_out(run, x)
    assert not any(map(writes, graph.graph.nodes))
    torch.testing.assert_close(graph(x), run(x))


def test_a_result_filled_step_by_step_is_one_stack() -> None:
    graph = check(rows, torch.randn(3, dtype=torch.float64))
    names = [getattr(node.target, "__name__", "") for node in graph.graph.nodes]
    assert names.count("stack") == 1 and "zeros" not in names and "cat" not in names


def writes_to_an_input(x: Tensor) -> Tensor:
    x[0] = 1
    return x * 2


def keeps_what_is_written_to_later(x: Tensor) -> Tensor:
    x[1] = 3
    out = torch.zeros(2, 3, dtype=x.dtype)
    out[0] = x
    x[0] = 1
    return out + x


def through_a_view_of_an_unknown_kind(x: Tensor) -> Tensor:
    out = torch.zeros(2, 3, dtype=x.dtype)
    flat = out.view(6)
    out[0] = x
    return flat * 2


def read_as_it_grows(x: Tensor) -> Tensor:
    """Each step reads all so far: a copy of that each time would cost more than the writes."""
    out, total = torch.zeros(9, 3, dtype=x.dtype), x
    for t in range(9):
        out[t] = total.sin()
        total = total + out[: t + 1].sum(0)
    return total


@pytest.mark.parametrize(
    "run",
    [
        writes_to_an_input,
        keeps_what_is_written_to_later,
        through_a_view_of_an_unknown_kind,
        read_as_it_grows,
    ],
)
def test_what_stays_as_it_is(run: Callable[..., Any]) -> None:
    inputs = torch.randn(3, dtype=torch.float64)
    graph = written_out(run, inputs)
    assert any(map(writes, graph.graph.nodes))
    given = [inputs.clone(), inputs.clone()]
    torch.testing.assert_close(graph(given[0]), run(given[1]))
    torch.testing.assert_close(*given)


def test_what_is_written_whole_is_the_callers_own() -> None:
    """A buffer that is filled with an input is not that input."""

    def run(x: Tensor) -> Tensor:
        out = torch.zeros(3, dtype=x.dtype)
        out[:] = x
        return out

    x = torch.randn(3, dtype=torch.float64)
    before = x.clone()
    pcr_fx.transform(Model(run), x)(x).add_(1)
    assert torch.equal(x, before)


def test_what_is_the_same_in_each_step_is_computed_once() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rates = nn.Parameter(torch.rand(2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(12):
                x = x * torch.sigmoid(self.rates[0]) + self.rates[1]
            return x

    fast = pcr_fx.transform(Steps(), torch.rand(3, dtype=torch.float64), {"solver": "sequential", "kernels": False})
    (entry,) = fast.report.chains
    assert entry.chain.length == 12
    assert [str(n.target) for n in entry.chain.body.graph.nodes if "getitem" in n.name or "sigmoid" in n.name] == []


def _marked(x: Tensor) -> Tensor:
    z = torch.zeros(x.shape[0], 4, dtype=x.dtype)
    z[:, 0] = 1
    return z


def _scattered(x: Tensor) -> Tensor:
    z = torch.zeros(x.shape[0], 4, dtype=x.dtype)
    return z.scatter_(1, torch.full((x.shape[0], 1), 2), 1.0)


def _by_tensors(x: Tensor) -> Tensor:
    z = x.new_zeros(x.shape[0], 2, 2)
    z[torch.arange(x.shape[0]), 0, 1] = x[:, 0]
    return z.reshape(x.shape[0], 4)


def _through_a_view(x: Tensor) -> Tensor:
    z = torch.zeros(x.shape[0], 4, dtype=x.dtype)
    z.view(-1)[::4].fill_(1)
    return z


@pytest.mark.parametrize("make", [_marked, _scattered, _by_tensors, _through_a_view])
@pytest.mark.parametrize("way", ["transform", "compile"])
def test_a_state_that_is_written_before_the_blocks(make: Callable[[Tensor], Tensor], way: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.ParameterList(torch.eye(4, dtype=torch.float64) + 0.1 * torch.rand(4, 4) for _ in range(12))

        def forward(self, x: Tensor) -> Tensor:
            z = make(x)
            for w in self.w:
                z = torch.tensordot(z, w, dims=([1], [0])).view(-1, 4)
            return z

    model, x = Model(), torch.rand(3, 2, dtype=torch.float64)
    options = {"solver": "sequential", "kernels": False}
    if way == "transform":
        fast: Any = pcr_fx.transform(model, x, options=options)
    else:
        torch._dynamo.reset()
        fast = torch.compile(model, backend="deeppcr", options={**options, "inner_backend": "eager"})
    assert_same(fast, model, x, 1e-11)
    report = pcr_fx.report(fast) if way == "transform" else pcr_fx.report()
    assert [chain["length"] for chain in report.to_dict()["chains"]] == [12], str(report)


class Coupling(nn.Module):
    """A block of a flow: half of the features scale and shift the others."""

    def __init__(self, first: list[int], rest: list[int]) -> None:
        super().__init__()
        self.register_buffer("first", torch.tensor(first))
        self.register_buffer("rest", torch.tensor(rest))
        self.net = nn.Linear(2, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        kept, moved = x[..., self.first], x[:, self.rest]
        scale, shift = self.net(kept).chunk(2, -1)
        out = torch.empty_like(x)
        out[:, self.first] = kept
        out[..., self.rest] = moved * torch.exp(torch.tanh(scale)) + shift
        return out


@pytest.mark.parametrize("options", [{"solver": "sequential"}, {"solver": "newton", "kernels": False}])
@pytest.mark.parametrize("way", ["transform", "compile"])
def test_couplings_are_chains(way: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    halves = [0, 2], [1, 3]
    model = nn.Sequential(*(Coupling(halves[block % 2], halves[1 - block % 2]) for block in range(10)))
    x = torch.randn(5, 4, dtype=torch.float64)
    if way == "transform":
        fast: Any = pcr_fx.transform(model, x, options)
    else:
        torch._dynamo.reset()
        fast = torch.compile(model, backend="deeppcr", options={**options, "inner_backend": "eager"})
    results = []
    for run in (fast, model):
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [leaf, *model.parameters()])])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)
    report = fast.report if way == "transform" else pcr_fx.report()
    assert [entry.chain.length for entry in report.chains] == [10]
