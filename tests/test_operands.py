"""Per-block parameters that kernels read in place: exchanged, moved, written to; and packed into one a column."""

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from comparison import relative_error, value_and_gradients
from models import ResidualNet, plain_mlp
from torch import Tensor, nn

import pcr_fx
from pcr_fx.operands import StackedAttributes

TOLERANCE = 1e-11


def deep(length: int = 12, **options: Any) -> ResidualNet:
    torch.manual_seed(0)
    return ResidualNet(length, **options).double()


def some(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def warm(model: nn.Module, **settings: Any) -> Any:
    """`model` transformed and called until its chain goes straight to its kernel."""
    fast = pcr_fx.transform(model, some(), **settings)
    for _ in range(2):
        with torch.no_grad():
            fast(some())
        fast(some()).sum()
    return fast


def assert_follows(fast: Any, model: nn.Module) -> None:
    """`fast` gives what `model` gives, with and without gradients; its parameters are the model's."""
    with torch.no_grad():
        assert relative_error(fast(some()), model(some())) <= TOLERANCE
    parameters = list(model.parameters())
    pairs = zip(
        value_and_gradients(fast, parameters, some()), value_and_gradients(model, parameters, some()), strict=True
    )
    for got, expected in pairs:
        assert relative_error(got, expected) <= TOLERANCE


# --- in place ---------------------------------------------------------------------------------------------------------


def test_many_parameters_are_read_in_place() -> None:
    fast = warm(deep())
    (variant,) = fast._pcr_variants
    columns = [s for s in variant.run.get_submodule("attributes").sources if isinstance(s, StackedAttributes)]
    assert len(columns) == 4
    assert all(column.table is not None for column in columns)


def exchange(model: ResidualNet) -> None:
    model.blocks[5].inner.weight = nn.Parameter(torch.randn_like(model.blocks[5].inner.weight))


def swap_data(model: ResidualNet) -> None:
    model.blocks[7].outer.bias.data = torch.randn_like(model.blocks[7].outer.bias)
    gc.collect()


def write(model: ResidualNet) -> None:
    with torch.no_grad():
        model.blocks[3].inner.weight.mul_(-2)


def not_contiguous(model: ResidualNet) -> None:
    model.blocks[4].inner.weight.data = torch.randn(4, 4, dtype=torch.float64).t()


def freeze_one(model: ResidualNet) -> None:
    model.blocks[2].inner.bias.requires_grad_(False)


def optimise(model: ResidualNet) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(some()).square().sum().backward()
    optimiser.step()


def load(model: ResidualNet) -> None:
    model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()})


@pytest.mark.parametrize("change", [swap_data, write, not_contiguous, freeze_one, optimise, load])
def test_what_happens_to_the_models_parameters_is_seen(change: Any) -> None:
    model = deep()
    fast = warm(model)
    for _ in range(2):
        change(model)
        if change is freeze_one:
            with torch.no_grad():
                assert relative_error(fast(some()), model(some())) <= TOLERANCE
            output = fast(some())
            output.sum().backward()
            frozen = model.blocks[2].inner.bias
            assert frozen.grad is None and model.blocks[1].inner.bias.grad is not None
        else:
            assert_follows(fast, model)


def test_exchanged_parameters_are_seen() -> None:
    fast = warm(deep())
    twin = deep()
    for _ in range(2):
        torch.manual_seed(1)
        exchange(fast)
        torch.manual_seed(1)
        exchange(twin)
        assert_same_by_name(fast, twin)
    fast.load_state_dict({name: 0.5 * value for name, value in twin.state_dict().items()}, assign=True)
    twin.load_state_dict({name: 0.5 * value for name, value in twin.state_dict().items()}, assign=True)
    assert_same_by_name(fast, twin)


def assert_same_by_name(fast: Any, twin: nn.Module) -> None:
    ours = value_and_gradients(fast, list(fast.parameters()), some())
    theirs = value_and_gradients(twin, list(twin.parameters()), some())
    for got, expected in zip(ours, theirs, strict=True):
        assert relative_error(got, expected) <= TOLERANCE


def test_a_write_between_forward_and_backward_is_an_error() -> None:
    model = deep()
    output = warm(model)(some()).sum()
    write(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_data_exchanged_between_forward_and_backward() -> None:
    """As in eager, the backward takes what the forward saved or what is there now, but never memory that was freed."""
    model = deep()
    fast = warm(model)
    output = fast(some()).sum()
    for block in model.blocks:
        block.inner.weight.data = block.inner.weight.data.clone()
    gc.collect()
    ours = torch.autograd.grad(output, list(model.parameters()))
    theirs = torch.autograd.grad(model(some()).sum(), list(model.parameters()))
    for got, expected in zip(ours, theirs, strict=True):
        assert relative_error(got, expected) <= TOLERANCE


def test_ten_thousand_blocks() -> None:
    model, x = plain_mlp(10_000), torch.randn(2, 4)
    fast = pcr_fx.transform(model, x)
    for _ in range(2):
        assert relative_error(fast(x), model(x)) <= 1e-4
        fast(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# --- packed -----------------------------------------------------------------------------------------------------------


def packed(model: nn.Module) -> Any:
    return warm(model, pack_parameters=True)


def assert_equal_state(fast: nn.Module, model: nn.Module) -> None:
    ours, theirs = fast.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12)


def train(model: nn.Module, steps: int = 3) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        model(some()).square().sum().backward()
        optimiser.step()


def test_one_parameter_a_column() -> None:
    model = deep()
    fast = packed(model)
    shapes = sorted(tuple(parameter.shape) for parameter in fast.packed.parameters())
    assert shapes == [(12, 4), (12, 4), (12, 4, 4), (12, 4, 4)]
    assert len(list(fast.parameters())) == 4 + 4  # the stem's and the head's
    assert_equal_state(fast, model)


def test_packed_training_is_the_models() -> None:
    model = deep()
    fast = packed(model)
    assert list(model.parameters())[2].shape == (4, 4)  # the model keeps its own
    train(fast)
    train(model)
    assert_equal_state(fast, model)


@pytest.mark.parametrize("assign", [False, True])
def test_packed_load_state_dict(assign: bool) -> None:
    fast, other = packed(deep()), deep()
    train(other)
    fast.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert_equal_state(fast, other)
    assert relative_error(fast(some()), other(some())) <= TOLERANCE
    train(fast)
    train(other)
    assert_equal_state(fast, other)


def test_packed_state_dict_errors_name_the_models_parameters() -> None:
    fast = packed(deep())
    state = deep().state_dict()
    del state["blocks.3.inner.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.3\.inner\.weight"):
        fast.load_state_dict(state)
    state["blocks.3.inner.weight"] = torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match=r"size mismatch for blocks\.3\.inner\.weight"):
        fast.load_state_dict(state)
    state["blocks.3.inner.weight"] = torch.zeros(4, 4)
    state["blocks.99.inner.weight"] = torch.zeros(4, 4)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*blocks\.99\.inner\.weight"):
        fast.load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_packed_copies_have_parameters_of_their_own(copied: Any) -> None:
    model = deep()
    fast = packed(model)
    other = copied(fast)
    train(other)
    assert_equal_state(fast, model)
    train(model)
    assert_equal_state(other, model)


def test_packed_in_another_dtype() -> None:
    model = deep()
    fast = packed(model).float()
    model = model.float()
    x = some().float()
    for _ in range(2):
        assert relative_error(fast(x), model(x)) <= 1e-5
        fast(x).sum().backward()
    assert all(parameter.dtype == torch.float32 for parameter in fast.parameters())


def test_packed_in_both_modes() -> None:
    """Another mode is traced anew, from blocks that have no parameters of their own any more."""
    model = deep(dropout=0.5).eval()
    fast = packed(model)
    fast.train()
    assert fast(some()).shape == (3, 2)  # dropout makes this no chain
    fast.eval()
    train(fast)
    train(model)
    assert_equal_state(fast, model)
    assert relative_error(fast(some(9)), model(some(9))) <= TOLERANCE


def test_parameters_used_elsewhere_are_not_packed() -> None:
    class Tied(ResidualNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.blocks[3].inner.weight.sum()

    torch.manual_seed(0)
    model = Tied(12).double()
    fast = packed(model)
    assert sorted(tuple(p.shape) for p in fast.packed.parameters()) == [(12, 4), (12, 4), (12, 4, 4)]
    train(fast)
    train(model)
    assert_equal_state(fast, model)
