"""What a traced graph takes for granted of its inputs' sizes: what the forward asked for, and no more."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import pcr_fx
from pcr_fx import explicit
from pcr_fx.passes.shapes import Sizes, _form_of_index

IN_OPS = {"solver": "sequential", "kernels": False}


class Loop(nn.Module):
    """A cell over the items that `items` reads off `[B, T, 4]`."""

    def __init__(self, items: Any) -> None:
        super().__init__()
        self.cell, self.items = nn.RNNCell(4, 4), items

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        for item in self.items(x):
            h = self.cell(item, h)
        return h


def halves(x: Tensor) -> Any:
    """A size of what is computed, and parts of it whose number hangs on no batch."""
    more = torch.relu(x) + 1
    return [more[:, t].chunk(2, -1)[0].repeat(1, 2) for t in range(more.size(1))]


ONE_SIZE = {
    "an item of the shape": lambda x: [x[:, t] for t in range(x.shape[1])],
    "an item from the end": lambda x: [x[:, t] for t in range(x.shape[-2])],
    "size of a dimension": lambda x: [x[:, t] for t in range(x.size(1))],
    "an item of size": lambda x: [x[:, t] for t in range(x.size()[1])],
    "a slice": lambda x: [x[:, t] for t in range(x.shape[1:2].numel())],
    "length": lambda x: [x.transpose(0, 1)[t] for t in range(len(x.transpose(0, 1)))],
    "iteration": lambda x: list(x.transpose(0, 1)),
    "unbind": lambda x: x.unbind(1),
    "of what was computed": halves,
    "split": lambda x: [part.squeeze(1) for part in x.split(1, 1)],
}


@pytest.mark.parametrize("kind", ONE_SIZE)
def test_only_the_sizes_that_were_asked_for_are_facts(kind: str) -> None:
    torch.manual_seed(0)
    model = Loop(ONE_SIZE[kind])
    fast = pcr_fx.transform(model, (torch.randn(3, 12, 4), torch.zeros(3, 4)), IN_OPS)
    for batch, steps, graphs in ((1, 12, 1), (12, 12, 1), (4, 10, 2), (2, 12, 2)):
        inputs = torch.randn(batch, steps, 4), torch.randn(batch, 4)
        torch.testing.assert_close(fast(*inputs), model(*inputs))
        assert len(fast._pcr_variants) == graphs, (batch, steps)


class Begun(nn.Module):
    """A cell over 12 items, from a state that `begin` makes of `[B, 12, 4]`."""

    def __init__(self, begin: Any) -> None:
        super().__init__()
        self.cell, self.begin, self.first = nn.RNNCell(4, 4), begin, nn.Parameter(torch.randn(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.begin(self, x)
        for t in range(12):
            h = self.cell(x[:, t], h)
        return h


def unpacked(_: Any, x: Tensor) -> Tensor:
    batch, _, width = x.shape
    return torch.zeros(batch, width)


def collected(_: Any, x: Tensor) -> Tensor:
    """A result that is filled step by step."""
    out = x.new_zeros(x.shape[0], 3, 4)
    for t in range(3):
        out[:, t] = x[:, t] * t
    return out.sum(1)


HANDED_ON = {
    "zeros": lambda m, x: torch.zeros(x.shape[0], 4),
    "a tuple": lambda m, x: torch.zeros((x.size(0), 4), dtype=x.dtype),
    "by name": lambda m, x: torch.ones(size=(x.size(dim=0), 4)),
    "counted from behind": lambda m, x: torch.ones(x.shape[-3], x.size(-1)),
    "new": lambda m, x: x.new_zeros([x.shape[0], 4]),
    "full": lambda m, x: torch.full((x.shape[0], 4), 0.5),
    "expand": lambda m, x: m.first.expand(x.shape[0], -1),
    "repeat": lambda m, x: m.first.repeat(x.shape[0], 1),
    "unpacked": unpacked,
    "collected": collected,
    "of a step": lambda m, x: torch.zeros(x[:, 0].shape[0], 4),
    "of a step by select": lambda m, x: torch.zeros(x.select(1, 0).size(0), 4),
    "of what is cut elsewhere": lambda m, x: torch.zeros(x[:, 2:, 1:].unbind(2)[0].size(0), 4),
    "of a part of a step": lambda m, x: torch.zeros(x[:, 0, 1:].size(0), x[:, 0].shape[-1]),
    "as a number": lambda m, x: torch.zeros(x.shape[0], 4) if isinstance(x.shape[0], int) else None,
}


@pytest.mark.parametrize("kind", HANDED_ON)
def test_a_size_that_is_handed_on_is_no_fact(kind: str) -> None:
    torch.manual_seed(0)
    model = Begun(HANDED_ON[kind]).double() if kind == "new" else Begun(HANDED_ON[kind])
    x = torch.randn(3, 12, 4, dtype=model.first.dtype)
    fast = pcr_fx.transform(model, x, IN_OPS)
    assert [entry.chain.length for entry in fast.report.chains] == [12]
    for batch in (3, 1, 2, 5):
        x = torch.randn(batch, 12, 4, dtype=x.dtype, requires_grad=True)
        (theirs,) = torch.autograd.grad(model(x).square().sum(), x)
        (ours,) = torch.autograd.grad(fast(x).square().sum(), x)
        torch.testing.assert_close(fast(x), model(x))
        torch.testing.assert_close(ours, theirs)
    assert len(fast._pcr_variants) == 1


@pytest.mark.parametrize("kind", ["dict", "list", "tuple"])
def test_a_size_of_what_comes_in_a_container_is_no_fact(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(4, 4)

        def forward(self, given: Any) -> Tensor:
            x = given["x"] if kind == "dict" else given[0]
            h = torch.zeros(x[:, 0].shape[0], 4)
            for t in range(12):
                h = self.cell(x[:, t], h)
            return h

    def inputs(batch: int) -> tuple[Any]:
        x = torch.randn(batch, 12, 4)
        return ({"dict": {"x": x}, "list": [x, x[0]], "tuple": (x,)}[kind],)

    model = Model()
    fast = pcr_fx.transform(model, inputs(3), IN_OPS)
    assert [entry.chain.length for entry in fast.report.chains] == [12]
    for batch in (3, 1, 2):
        given = inputs(batch)
        torch.testing.assert_close(fast(*given), model(*given))
    assert len(fast._pcr_variants) == 1
    assert "Traceback" not in capfd.readouterr().err


def test_a_size_of_what_is_cut_or_computed_is_a_fact() -> None:
    for begin in (
        lambda _, x: torch.zeros(x[:4, 0].shape[0], 4),
        lambda _, x: torch.zeros(x.select(1, 0)[:4].shape[0], 4),
        lambda _, x: torch.zeros(torch.relu(x).shape[0], 4),
    ):
        model = Begun(begin)
        fast = pcr_fx.transform(model, torch.randn(3, 12, 4), IN_OPS)
        for batch in (3, 1, 4):
            x = torch.randn(batch, 12, 4)
            torch.testing.assert_close(fast(x), model(x))
        assert len(fast._pcr_variants) == 3, begin


ASKED = {
    "a product": lambda b: b * 2,
    "a number times it": lambda b: 0.5 * b,
    "a share": lambda b: 1 / b,
    "a power": lambda b: 2**b,
    "a range": lambda b: len(range(b)),
    "a list": lambda b: len([0] * b),
    "the smaller": lambda b: min(b, 4),
    "a comparison": lambda b: 1.0 if b > 3 else 2.0,
    "a truth": lambda b: 1.0 if b else 2.0,
    "a key": lambda b: {n: float(n) for n in range(9)}[b],
    "text": lambda b: float(f"{b:3d}") + float(str(b)) + float(f"{b:d}"),
    "a root": lambda b: math.sqrt(b) + float(np.sqrt(b)),
    "an array": lambda b: float(np.ones(b).sum()),
    "a tensor": lambda b: torch.tensor([b, 2 * b]).sum(),
    "a row": lambda b: torch.arange(b).sum(),
    "a filling": lambda b: torch.full((4,), b).sum(),
    "a property": lambda b: b.numerator + b.bit_length(),
    "a copy": lambda b: copy.deepcopy(b) + 0,
    "a type": lambda b: float(int(b)) + round(b),
}


@pytest.mark.parametrize("kind", ASKED)
def test_a_size_whose_value_matters_is_a_fact(kind: str) -> None:
    model = Begun(lambda _, x: torch.zeros(x.shape[0], 4) + 0.01 * ASKED[kind](x.shape[0]))
    fast = pcr_fx.transform(model, torch.randn(3, 12, 4), IN_OPS)
    for graphs, batch in enumerate((3, 1, 5), 1):
        x = torch.randn(batch, 12, 4)
        torch.testing.assert_close(fast(x), model(x))
        assert len(fast._pcr_variants) == graphs


def test_a_size_is_what_it_was_when_it_was_read() -> None:
    def begin(_: Any, x: Tensor) -> Tensor:
        copy = x[:, 0].clone()
        batch = copy.shape[0]
        copy.t_()
        return torch.zeros(batch, 4) + copy.sum()

    model = Begun(begin)
    fast = pcr_fx.transform(model, torch.randn(3, 12, 4), IN_OPS)
    for batch in (3, 5):
        x = torch.randn(batch, 12, 4)
        torch.testing.assert_close(fast(x), model(x))


def test_a_size_that_every_block_takes_does_not_break_the_chain() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(12):
                x = torch.tanh(self.inner(x)) + x.new_ones(x.shape[0], 4)
            return x

    model = Model()
    fast = pcr_fx.transform(model, torch.randn(3, 4), IN_OPS)
    assert [entry.chain.length for entry in fast.report.chains] == [12]
    for batch in (3, 1, 2):
        x = torch.randn(batch, 4)
        torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: torch.zeros(x.shape[0], 4),
        lambda x: torch.zeros(x.shape)[:, 0],
        lambda x: torch.zeros(*x.shape)[:, 0],
        lambda x: torch.zeros((2, *x.shape))[0, :, 0],
        lambda x: torch.zeros((2,) + x.shape)[0, :, 0],  # noqa: RUF005
        lambda x: torch.full((sum(x.shape) - 16, 4), 1.0),
        lambda x: torch.zeros(x.numel() // 48, 4),
        lambda x: 1.0 if x.shape == (3, 12, 4) else 2.0,
        lambda x: 1.0 if 3 in x.shape else 2.0,
        lambda x: float(len({x.shape, torch.Size([3, 12, 4])})),
        lambda x: 1.0 if x[:, :5].sum(1).shape[0] > 2 else 2.0,
        lambda x: 1.0 if x.squeeze(0).dim() == 3 else 2.0,
    ],
)
def test_what_hangs_on_the_batch_size_is_traced_for_each(ask: Any) -> None:
    class Model(Loop):
        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return super().forward(x, h + ask(x))

    torch.manual_seed(0)
    model = Model(ONE_SIZE["unbind"])
    fast = pcr_fx.transform(model, (torch.randn(3, 12, 4), torch.zeros(3, 4)), IN_OPS)
    for batch in (3, 1, 2):
        inputs = torch.randn(batch, 12, 4), torch.randn(batch, 4)
        torch.testing.assert_close(fast(*inputs), model(*inputs))


def test_a_shape_is_what_torch_size_is_and_tells_what_is_read() -> None:
    heard: list[int] = []
    shape = Sizes.of(torch.Size([2, 3, 5]), fx.Graph().placeholder("x"), heard.append)
    assert len(shape) == 3 and len([*shape]) == 3 and not heard
    assert shape[1] == 3 and shape[-1] == 5 and heard == [1, 2]
    assert shape[1:] == torch.Size([3, 5]) and heard == [1, 2, 1, 2]
    for whole in (
        lambda: (*shape,) == (2, 3, 5),
        lambda: shape + (1,),  # noqa: RUF005
        lambda: (1,) + shape,  # noqa: RUF005
        lambda: shape == (2, 3, 5),
        lambda: hash(shape),
        lambda: repr(shape),
        lambda: sorted(shape),
        lambda: torch.Size(shape) == (2, 3, 5),
        lambda: list(map(int, shape)),
        lambda: shape.numel(),
        lambda: 5 in shape,
    ):
        heard.clear()
        whole()
        assert set(heard) == {0, 1, 2}
    assert (1,) + shape == torch.Size([1, 2, 3, 5]) and shape + (1,) == torch.Size([2, 3, 5, 1])  # noqa: RUF005


def test_verdicts_on_other_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcr_fx.passes.shapes._VERDICTS", 4)
    model = Loop(ONE_SIZE["unbind"])
    fast = pcr_fx.transform(model, (torch.randn(3, 8, 4), torch.zeros(3, 4)), {**IN_OPS, "min_length": 20})
    for batch in range(1, 12):
        fast(torch.randn(batch, 8, 4), torch.zeros(batch, 4))
    (variant,) = fast._pcr_variants
    assert variant.captured.answers is not None and len(variant.captured.answers._verdicts) == 4


def test_graphs_of_many_lengths_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explicit, "_GRAPHS_KEPT", 3)
    model = Loop(ONE_SIZE["unbind"])
    fast = pcr_fx.transform(model, (torch.randn(3, 8, 4), torch.zeros(3, 4)), IN_OPS)
    for steps in range(8, 14):
        fast(torch.randn(3, steps, 4), torch.zeros(3, 4))
    assert len(fast._pcr_variants) == 3


class AsksForGradients(nn.Module):
    """Doubles its result for inputs that require gradients, and for a first weight that does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(9))

    def forward(self, x: Tensor, others: tuple[Tensor, ...] = ()) -> Tensor:
        factor = (2 if x.requires_grad else 1) * (3 if self.layers[0].weight.requires_grad else 1)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return factor * x


def test_whether_inputs_and_weights_require_gradients() -> None:
    torch.manual_seed(0)
    model, plain = AsksForGradients(), torch.randn(2, 3)
    fast = pcr_fx.transform(model, plain, {"kernels": False, "planning": "estimated"})
    for _ in range(2):
        for x in (plain, plain.clone().requires_grad_(), plain.clone()):
            torch.testing.assert_close(fast(x), model(x))
        for module in (fast, model):
            module.layers[0].weight.requires_grad_(not module.layers[0].weight.requires_grad)
            if module.layers[0].weight is model.layers[0].weight:
                break  # they share it
    assert len(fast._pcr_variants) == 4


def test_what_is_computed_is_not_known_to_require_gradients() -> None:
    class Asks(AsksForGradients):
        def forward(self, x: Tensor, others: tuple[Tensor, ...] = ()) -> Tensor:
            y = super().forward(x)
            return 2 * y if y.requires_grad else y

    with pytest.raises(
        pcr_fx.CaptureError, match=r"the model asks for requires_grad of a tensor at .* not known while it is read"
    ):
        pcr_fx.transform(Asks(), torch.randn(2, 3))
    with pytest.raises(pcr_fx.CaptureError, match="pass example_inputs if it is one of x"):
        pcr_fx.transform(AsksForGradients())


def test_indexes_of_one_form_give_results_of_one_form() -> None:
    x = torch.zeros(3, 4, 5)
    entries = [
        0,
        2,
        -1,
        -3,
        None,
        ...,
        slice(None),
        slice(1),
        slice(1, 3),
        slice(-2, None),
        slice(0, 4, 2),
        slice(1, None, 2),
    ]
    found: dict[Any, set[Any]] = {}
    for index in itertools.chain.from_iterable(itertools.product(entries, repeat=length) for length in (1, 2, 3)):
        form = _form_of_index(index, x.shape)
        if form is None:
            assert index.count(...) > 1
        else:
            found.setdefault(form, set()).add((x[index].shape, x[index].stride()))
    assert len(found) > 100
    assert all(len(results) == 1 for results in found.values())
    for refused in ((3,), (-4, 0), (0, 0, 0, 0), (True,), (slice(0, 2, -1),), (torch.tensor(0),)):
        assert _form_of_index(refused, x.shape) is None
