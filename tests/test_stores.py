"""What a forward stores in modules, modules of Python and closures, a transformed module stores at each call, or says why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pcr_fx

OPTIONS = {"kernels": False, "planning": "estimated"}
LAST: Any = None
COUNT = 0
LOG: list[int] = []
KNOWN: dict[str, Any] = {}


class Block(nn.Module):
    aux: Any = None
    shape: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x))
        self.aux, self.shape, self.ran = y.square().mean(), x.shape, True
        return y


class Net(nn.Module):
    """Runs blocks; then `store` stores something."""

    def __init__(self, store: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(9))
        self.store, self.calls, self.ready, self.listed, self.mask = store, 0, False, [0], None

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for block in self.blocks:
            y = block(y)
        self.store(self, x, y)
        return y


def nothing(model: Any, x: Tensor, y: Tensor) -> None:
    pass


def inputs(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)


def pair(store: Callable[[Any, Tensor, Tensor], Any], **settings: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Net(store).double()
    return pcr_fx.transform(copy.deepcopy(model), inputs(), OPTIONS, **settings), model


def store_last(model: Any, x: Tensor, y: Tensor) -> None:
    global LAST
    LAST = {"state": y.detach(), "shape": x.shape}


def fill_lazily(model: Any, x: Tensor, y: Tensor) -> None:
    if not model.ready:
        model.ready, model.size = True, x.shape[1]


STORES: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "a constant": lambda m, x, y: setattr(m, "kept", (True, 3.5)),
    "a shape": lambda m, x, y: setattr(m, "kept", x.shape),
    "a size": lambda m, x, y: setattr(m, "kept", x.shape[0]),
    "a tensor": lambda m, x, y: setattr(m, "kept", y * 2),
    "a list": lambda m, x, y: setattr(m, "kept", [x, {"y": y, "n": 2}]),
    "a list in place of another": lambda m, x, y: setattr(m, "listed", [y]),
    "two after another": lambda m, x, y: (setattr(m, "kept", x), setattr(m, "kept", y)),
    "in a block": lambda m, x, y: setattr(m.blocks[4], "kept", y),
    "filled once": fill_lazily,
}


def found(model: Any) -> Any:
    return (
        getattr(model, "kept", None),
        model.listed,
        model.ready,
        getattr(model.blocks[4], "kept", None),
        [(block.aux, block.shape, block.ran) for block in model.blocks],
    )


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("name", STORES)
def test_what_is_stored_is_stored_at_each_call(name: str, pack: bool) -> None:
    fast, model = pair(STORES[name], pack_parameters=pack)
    assert not hasattr(fast, "kept") and fast.blocks[0].aux is None
    for batch in (2, 2, 5, 2):
        torch.testing.assert_close(fast(inputs(batch)), model(inputs(batch)))
        torch.testing.assert_close(found(fast), found(model))
    assert fast.report.chains and not fast.report.notes
    assert len(fast._pcr_variants) <= 3  # one before there is anything stored, and one for each batch size


def test_gradients_of_what_is_stored() -> None:
    fast, model = pair(nothing)
    gradients = []
    for module in (fast, model):
        x = inputs().requires_grad_()
        (module(x).sum() + sum(block.aux for block in module.blocks)).backward()
        gradients.append([x.grad, *(parameter.grad for _, parameter in module.named_parameters())])
    torch.testing.assert_close(*gradients)


def test_hooks_see_what_was_stored_before_them() -> None:
    fast, model = pair(nothing)
    seen: dict[Any, list[Any]] = {}
    for module in (fast, model):
        seen[module] = []
        hook = lambda block, given, result, seen=seen[module]: seen.append(block.aux.detach() + 0)  # noqa: E731
        module.blocks[4].register_forward_hook(hook)
        for batch in (2, 3, 2):
            module(inputs(batch))
    torch.testing.assert_close(seen[fast], seen[model])


def test_a_name_of_a_module_of_python() -> None:
    global LAST
    fast, model = pair(store_last)
    assert LAST is None, "a trace leaves nothing behind"
    for batch in (2, 4, 2):
        fast(inputs(batch))
        got, LAST = LAST, None
        model(inputs(batch))
        torch.testing.assert_close(got, LAST)
    LAST = None


def test_a_name_of_a_closure() -> None:
    state: Any = None

    def store(model: Any, x: Tensor, y: Tensor) -> None:
        nonlocal state
        state = y.detach()

    fast = pair(store)[0]
    assert state is None
    torch.testing.assert_close(fast(inputs()), state)
    torch.testing.assert_close(fast(inputs(3)), state)


def count_calls(model: Any, x: Tensor, y: Tensor) -> None:
    model.calls += 1


def count_all_calls(model: Any, x: Tensor, y: Tensor) -> None:
    global COUNT
    COUNT += 1


def counter() -> Callable[[Any, Tensor, Tensor], None]:
    count = 0

    def store(model: Any, x: Tensor, y: Tensor) -> None:
        nonlocal count
        count += 1

    return store


@pytest.mark.parametrize(
    ("name", "store"),
    [
        (r"Net\.calls", count_calls),
        ("COUNT", count_all_calls),
        ("count", counter()),
        (r"Net\.listed", lambda m, x, y: m.listed.append(y)),
        ("LOG", lambda m, x, y: LOG.append(1)),
        ("KNOWN", lambda m, x, y: KNOWN.update(last=y)),
    ],
)
def test_what_evolves_is_refused(name: str, store: Callable[[Any, Tensor, Tensor], Any]) -> None:
    with pytest.raises(
        pcr_fx.CaptureError, match=f"the model keeps {name} from call to call: it reads it and changes it"
    ):
        pair(store)
    assert (COUNT, LOG, KNOWN) == (0, [], {})


def test_what_saves_time_is_said_not_to_be_kept() -> None:
    def keep_mask(model: Any, x: Tensor, y: Tensor) -> None:
        KNOWN["size"] = 3
        if model.mask is None:
            model.mask = torch.ones(3, 3).tril()

    fast, model = pair(keep_mask)
    got = fast(inputs())
    assert fast.report.notes == [
        "Net.mask, which the forward sets, is not set by the transformed module",
        "KNOWN, to which the forward adds, is not added to",
    ]
    torch.testing.assert_close(got, model(inputs()))
    KNOWN.clear()


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_lists_of_weights_that_pytorchs_modules_keep_are_not_spoken_of(kind: Any) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = kind(4, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)[0]

    model, x = Network(), torch.randn(2, 12, 4)
    fast = pcr_fx.transform(model, x)
    assert fast.report.notes == []
    torch.testing.assert_close(fast(x), model(x))
