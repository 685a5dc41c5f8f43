"""Packed parameters among what else is done to a model: what cannot be packed, parts of a packed model, files."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import relative_error
from models import ResidualNet
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import pcr_fx

QUICK = {"kernels": False, "planning": "estimated"}


def some() -> Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def pair(change: Callable[[Any], Any] = lambda model: None) -> tuple[Any, ResidualNet]:
    """A packed model, and the model; `change` is made before."""
    torch.manual_seed(0)
    model = ResidualNet(9).double()
    change(model)
    return pcr_fx.transform(model, some(), QUICK, pack_parameters=True), model


def assert_follows(fast: nn.Module, model: nn.Module) -> None:
    for module in (fast, model):
        module.zero_grad()
        module(some()).square().sum().backward()
    assert relative_error(fast(some()), model(some())) <= 1e-11
    for name, parameter in model.named_parameters():
        path, _, own = name.rpartition(".")
        part = dict.get(fast.get_submodule(path)._parameters, own)
        if part is not None and parameter.requires_grad:
            assert relative_error(part.grad, parameter.grad) <= 1e-11


class Half(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value / 2


class Marked(nn.Parameter):
    pass


def mark(model: Any) -> None:
    model.blocks[3].inner.weight = Marked(model.blocks[3].inner.weight.detach())


def double_gradient(parameter: Tensor) -> None:
    parameter.grad.mul_(2)


def tie(model: Any) -> None:
    model.blocks[3].inner.weight = model.blocks[4].inner.weight


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.blocks[3].inner.weight.register_hook(lambda g: 2 * g), "some have hooks"),
        (lambda m: m.blocks[3].inner.weight.register_post_accumulate_grad_hook(double_gradient), "have hooks"),
        (lambda m: m.blocks[3].inner.weight.requires_grad_(False), "they differ in requires_grad, True and False"),
        (mark, "some are of type Marked"),
        (tie, "some of them are one parameter"),
    ],
)
def test_what_cannot_be_packed_stays_as_it_is_and_is_named(change: Callable[[Any], Any], reason: str) -> None:
    fast, model = pair(change)
    (note,) = fast.report.notes
    assert note.startswith("blocks.0.inner.weight and the 8 like it are not packed: ") and reason in note
    assert len(list(fast.packed.parameters())) == 3
    assert_follows(fast, model)
    fast.train()
    fast.blocks[3].train(False)
    assert_follows(fast, model)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: [prune.l1_unstructured(block.inner, "weight", 0.5) for block in m.blocks],
        lambda m: [nn.utils.weight_norm(block.inner) for block in m.blocks],
        lambda m: [parametrize.register_parametrization(block.inner, "weight", Half()) for block in m.blocks],
    ],
)
def test_weights_that_are_computed_from_packed_ones(change: Callable[[Any], Any]) -> None:
    fast, model = pair(change)
    assert_follows(fast, model)
    state = fast.state_dict()
    torch.testing.assert_close(state, model.state_dict())
    smaller = {name: value / 3 for name, value in state.items()}
    fast.load_state_dict(smaller)
    model.load_state_dict(smaller)
    assert_follows(fast, model)


def test_a_block_can_be_called_read_and_written() -> None:
    fast, model = pair()
    x = torch.randn(2, 4).double()
    torch.testing.assert_close(fast.blocks[3](x), model.blocks[3](x))
    torch.testing.assert_close(fast.blocks[3].inner.weight, model.blocks[3].inner.weight.data)
    fast.blocks[3](x).sum().backward()
    model.blocks[3](x).sum().backward()
    pack = fast.packed.blocks_inner_weight
    torch.testing.assert_close(pack.grad[3], model.blocks[3].inner.weight.grad)
    assert not pack.grad[[0, 1, 2, 4]].any()
    assert "Linear(in_features=4, out_features=4, bias=True)" in repr(fast.blocks[3])
    with torch.no_grad():
        for module in (fast, model):
            module.blocks[3].inner.weight.mul_(2)
    assert_follows(fast, model)
    fast.load_state_dict(model.state_dict())
    fast.blocks[4].load_state_dict(model.blocks[3].state_dict())
    model.blocks[4].load_state_dict(model.blocks[3].state_dict())
    torch.testing.assert_close(fast.blocks.state_dict(), model.blocks.state_dict())
    assert_follows(fast, model)


def test_hooks_and_gradient_of_a_part_are_the_packs() -> None:
    fast, model = pair()
    x = some()
    weight, original, seen = fast.blocks[3].inner.weight, model.blocks[3].inner.weight, []
    handle = weight.register_hook(lambda gradient: (seen.append(gradient), 2 * gradient)[1])
    weight.register_post_accumulate_grad_hook(lambda part: seen.append(part.grad))
    fast(x).sum().backward()
    model(x).sum().backward()
    for got, factor in ((seen[0], 1), (seen[1], 2), (fast.blocks[3].inner.weight.grad, 2)):
        torch.testing.assert_close(got, factor * original.grad)
    torch.testing.assert_close(fast.blocks[4].inner.weight.grad, model.blocks[4].inner.weight.grad)
    handle.remove()
    fast(x).sum().backward()
    torch.testing.assert_close(weight.grad, 3 * original.grad)
    saved = io.BytesIO()
    torch.save(weight, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved), original)


def test_a_block_with_one_that_is_missing_is_refused() -> None:
    fast, _ = pair()
    state = fast.blocks[3].state_dict()
    del state["inner.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*inner\.weight"):
        fast.blocks[3].load_state_dict(state)


@pytest.mark.parametrize(
    "exchange",
    [
        lambda m: setattr(m.blocks[3].inner, "weight", nn.Parameter(torch.zeros(4, 4).double())),
        lambda m: delattr(m.blocks[3].inner, "weight"),
        lambda m: parametrize.register_parametrization(m.blocks[3].inner, "weight", Half()),
    ],
)
def test_a_part_of_a_pack_is_not_exchanged(exchange: Callable[[Any], Any]) -> None:
    fast, model = pair()
    with pytest.raises(pcr_fx.UnsupportedError, match="is part of the packed parameter blocks_inner_weight"):
        exchange(fast)
    with torch.no_grad():
        assert relative_error(fast(some()), model(some())) <= 1e-11


def test_blocks_are_exchanged_and_moved_whole() -> None:
    fast, model = pair()
    other = copy.deepcopy(model.blocks[0])
    for module in (fast, model):
        module.blocks[3] = copy.deepcopy(other)
        module.blocks.insert(1, copy.deepcopy(other))
    assert_follows(fast, model)
    torch.testing.assert_close(fast.state_dict(), model.state_dict())
    copied = pickle.loads(pickle.dumps(fast))
    fast.load_state_dict({name: value / 2 for name, value in model.state_dict().items()})
    assert_follows(copied, model)
    model.load_state_dict({name: value / 2 for name, value in model.state_dict().items()})
    assert_follows(fast, model)


def test_hooks_of_packed_blocks_run() -> None:
    fast, model = pair()
    for module in (fast, model):
        module.blocks[3].register_forward_hook(lambda module, given, result: 2 * result)
    assert_follows(fast, model)


def test_safetensors(tmp_path: Path) -> None:
    files = pytest.importorskip("safetensors.torch")
    fast, model = pair()
    files.save_model(fast, str(tmp_path / "model"))
    state = files.load_file(str(tmp_path / "model"))
    torch.testing.assert_close(state, dict(model.state_dict()))
    other, _ = pair(lambda model: model.load_state_dict({k: v * 0 for k, v in model.state_dict().items()}))
    files.load_model(other, str(tmp_path / "model"))
    assert_follows(other, model)
    files.save_file(fast.state_dict(), str(tmp_path / "state"))


def test_a_parameter_that_is_kept_in_a_dict_as_well_is_not_packed() -> None:
    class Listing(ResidualNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + self.kept["first"].sum())

    torch.manual_seed(0)
    model = Listing(9).double()
    model.kept = {"first": model.blocks[0].inner.bias}
    fast = pcr_fx.transform(model, some(), QUICK, pack_parameters=True)
    assert fast.report.notes == ["blocks.0.inner.bias and the 8 like it are not packed: used elsewhere as well"]
    assert_follows(fast, model)
    assert_follows(fast.eval(), model.eval())


def test_on_no_device_and_loaded_later() -> None:
    torch.manual_seed(0)
    model = ResidualNet(9).double()
    with torch.device("meta"):
        empty = ResidualNet(9).double()
    fast = pcr_fx.transform(empty, options=QUICK, pack_parameters=True)
    fast.load_state_dict(model.state_dict(), assign=True)
    assert_follows(fast, model)


# --- a part of the model by itself ------------------------------------------------------------------------------------


def test_parameters_of_blocks_are_listed() -> None:
    fast, model = pair()
    assert fast.get_parameter("blocks.3.inner.weight").shape == model.blocks[3].inner.weight.shape
    for part in (
        lambda m: m.blocks[3],
        lambda m: m.blocks[:6],
        lambda m: m.blocks,
        lambda m: nn.Sequential(m.blocks[2]),
    ):
        listed = dict(part(fast).named_parameters())
        assert listed and all(isinstance(value, nn.Parameter) for value in listed.values())
        torch.testing.assert_close(
            {name: value.detach() for name, value in listed.items()},
            {name: value.detach() for name, value in part(model).named_parameters()},
        )
    # Where those that they are parts of are listed, or each module is asked for its own, they are none.
    for whole in (fast, nn.Sequential(fast), nn.ModuleDict({"first": fast.blocks[0], "all": fast})):
        assert all(value.is_leaf for value in whole.parameters())
    assert not [name for name, _ in fast.blocks[3].inner.named_parameters(recurse=False)]


def test_gradients_of_blocks_are_clipped_and_cleared() -> None:
    fast, model = pair()
    norms = []
    for module in (fast, model):
        module(some()).sum().backward()
        norms.append(nn.utils.clip_grad_norm_(module.blocks[3].parameters(), 1e-3))
        module.blocks[2].zero_grad()
    torch.testing.assert_close(*norms)
    for ours, theirs in zip(fast.blocks.parameters(), model.blocks.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, torch.zeros_like(theirs) if theirs.grad is None else theirs.grad)


@pytest.mark.parametrize(
    "freeze",
    [
        lambda m: m.blocks[:6].requires_grad_(False),
        lambda m: m.blocks[3].inner.requires_grad_(False),
        lambda m: m.get_parameter("blocks.3.inner.weight").requires_grad_(False),
        lambda m: setattr(m.blocks[3].inner.weight, "requires_grad", False),
        lambda m: [value.requires_grad_(False) for value in m.blocks[3].parameters()],
    ],
)
def test_a_part_of_a_pack_is_not_frozen(freeze: Callable[[Any], Any]) -> None:
    fast, _ = pair()
    with pytest.raises(pcr_fx.UnsupportedError, match="requires gradients as a whole or not at all"):
        freeze(fast)
    fast.blocks[3].requires_grad_(True)


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.blocks[0].float(),
        lambda m: m.blocks[:2].to("meta"),
        lambda m: m.blocks[0].inner.double(),
        lambda m: nn.Sequential(m.blocks[1]).bfloat16(),
    ],
)
@pytest.mark.parametrize("swaps", [False, True])
def test_a_part_of_a_pack_is_not_converted(convert: Callable[[Any], Any], swaps: bool) -> None:
    fast, model = pair()
    torch.__future__.set_swap_module_params_on_conversion(swaps)
    try:
        with pytest.raises(pcr_fx.UnsupportedError, match="converted and moved as a whole"):
            convert(fast)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_follows(fast, model)
    torch.testing.assert_close(nn.Sequential(fast).float()(some().float()), model.float()(some().float()))


def test_an_optimiser_does_not_take_parts() -> None:
    fast, _ = pair()
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.SGD(fast.blocks[3].parameters(), lr=0.1)
