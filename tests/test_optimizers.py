"""Optimizers that were made for a model, and go on with its packed parameters."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import relative_error
from models import ResidualNet
from torch import Tensor, nn, optim

import pcr_fx

QUICK = {"kernels": False, "planning": "estimated"}
X, Y = (torch.randn(8, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for size in (3, 2))


def model_of(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return ResidualNet(9).double()


def packed(model: nn.Module, optimizer: Any) -> Any:
    return pcr_fx.transform(model, X, QUICK, pack_parameters=True, optimizer=optimizer)


def backward(model: nn.Module) -> None:
    nn.functional.mse_loss(model(X), Y).backward()


def train(model: nn.Module, optimizer: optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


def assert_same_models(got: nn.Module, expected: nn.Module) -> None:
    state = got.state_dict()
    assert list(state) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        assert relative_error(state[name], value) <= 1e-9, name


def assert_same_states(got: optim.Optimizer, expected: optim.Optimizer) -> None:
    ours, theirs = got.state_dict(), expected.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in theirs["state"].items():
        torch.testing.assert_close(ours["state"][key], state, rtol=1e-8, atol=1e-12)


OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "plain SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "AdamW, fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "Adamax": lambda p: optim.Adamax(p, lr=0.01),
    "NAdam": lambda p: optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: optim.RAdam(p, lr=0.01),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.1, lr_decay=0.1),
    "Adadelta": lambda p: optim.Adadelta(p, lr=1.0),
    "Rprop": lambda p: optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: optim.ASGD(p, lr=0.1, t0=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_goes_on_as_with_the_models_own_parameters(name: str) -> None:
    model, twin = model_of(), model_of()
    optimizer, moved = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    for one, its in ((model, optimizer), (twin, moved)):
        train(one, its, 3)
        backward(one)  # of which the gradients are not used yet
    fast = packed(twin, moved)
    assert len(moved.param_groups[0]["params"]) == len(list(fast.parameters())) == 8
    assert all(
        known is own for known, own in zip(moved.param_groups[0]["params"][:2], fast.stem.parameters(), strict=True)
    )
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    for one, its in ((model, optimizer), (fast, moved)):
        its.step()
        train(one, its, 6)
    assert_same_models(fast, model)
    assert_same_states(moved, optimizer)
    torch.testing.assert_close(dict(twin.state_dict()), before)  # which is no longer trained


def test_checkpoints_go_both_ways() -> None:
    model, optimizer = (made := model_of()), optim.Adam(made.parameters(), lr=0.01)
    other = model_of(1)
    moved = optim.Adam(other.parameters(), lr=0.5)
    fast = packed(other, moved)
    train(model, optimizer, 3)
    saved = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), saved)
    saved.seek(0)
    for into, state in zip((fast, moved), torch.load(saved), strict=True):
        into.load_state_dict(state)
    train(model, optimizer, 2)
    train(fast, moved, 2)
    assert_same_models(fast, model)
    assert_same_states(moved, optimizer)
    back = model_of(2)
    fresh = optim.Adam(back.parameters())
    back.load_state_dict(fast.state_dict())
    fresh.load_state_dict(moved.state_dict())
    steps = [state["step"] for state in fresh.state.values()]
    assert len({step.data_ptr() for step in steps}) == len(steps)  # each is counted on by itself
    fast.requires_grad_(False)
    fresh.load_state_dict(copy.deepcopy(moved.state_dict()))
    train(model, optimizer, 5)
    train(back, fresh, 5)
    assert_same_models(back, model)


def by_name(model: nn.Module) -> list[dict[str, Any]]:
    """Biases without weight decay; with names, in an order of their own."""
    named = list(model.named_parameters())[::-1]
    return [
        {"params": [pair for pair in named if pair[0].endswith("weight")], "weight_decay": 0.1},
        {"params": [pair for pair in named if pair[0].endswith("bias")], "weight_decay": 0.0, "lr": 0.02},
    ]


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}])
def test_what_else_a_training_loop_has(options: dict[str, bool]) -> None:
    def ten_steps(pack: bool) -> tuple[Any, ...]:
        model = model_of()
        optimizer = optim.AdamW(by_name(model), lr=0.01, **options)
        schedule = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.05, 0.02], total_steps=10)
        held = optimizer.param_groups[0]["params"]
        model = packed(model, optimizer) if pack else model
        assert held is optimizer.param_groups[0]["params"]
        average = optim.swa_utils.AveragedModel(model, multi_avg_fn=optim.swa_utils.get_ema_multi_avg_fn(0.9))
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        norms = []
        for _ in range(10):
            optimizer.zero_grad()
            scaler.scale(nn.functional.mse_loss(model(X), Y)).backward()
            scaler.unscale_(optimizer)
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            average.update_parameters(model)
        return model, optimizer, average, torch.stack(norms)

    (fast, moved, average, norms), (model, optimizer, expected, norms_expected) = map(ten_steps, (True, False))
    assert [len(group["params"]) for group in moved.param_groups] == [4, 4]
    assert "packed.blocks_inner_weight" in moved.param_groups[0]["param_names"]
    assert relative_error(norms, norms_expected) <= 1e-9
    assert_same_models(fast, model)
    assert_same_models(average.module, expected.module)
    assert_same_states(moved, optimizer)
    moved.load_state_dict(optimizer.state_dict())
    assert "packed.blocks_inner_weight" in moved.param_groups[0]["param_names"]
    assert_same_states(moved, optimizer)


def groups_by_block(model: Any) -> list[dict[str, Any]]:
    return [{"params": model.blocks[k].parameters(), "lr": 0.01 * k} for k in range(9)]


def only_some(model: Any) -> list[dict[str, Any]]:
    return [{"params": [*model.blocks[:4].parameters(), *model.head.parameters()]}]


@pytest.mark.parametrize(
    ("groups", "frozen", "reason"),
    [
        (groups_by_block, False, "they are in groups 0 and 1 of the optimizer"),
        (only_some, False, "the optimizer has 4 of them"),
        (lambda model: [{"params": model.parameters()}], True, "they differ in step, 2 and 1"),
    ],
)
def test_what_an_optimizer_treats_differently_stays_apart(
    groups: Callable[[Any], list[dict[str, Any]]], frozen: bool, reason: str
) -> None:
    model, twin = model_of(), model_of()
    optimizer, moved = (optim.Adam(groups(one), lr=0.01) for one in (model, twin))
    for one, its in ((model, optimizer), (twin, moved)):
        for step in range(2):
            one.blocks[3].requires_grad_(not frozen or step == 1)
            train(one, its, 1)
    fast = packed(twin, moved)
    notes = [note for note in fast.report.notes if "not packed" in note]
    assert len(notes) == 4 and all(reason in note for note in notes), notes
    train(model, optimizer, 3)
    train(fast, moved, 3)
    assert_same_models(fast, model)
    assert_same_states(moved, optimizer)


def test_two_models_and_a_group_of_later_share_an_optimizer() -> None:
    def pair(pack: bool) -> tuple[Any, ...]:
        first, second, scale = model_of(), model_of(1), nn.Parameter(torch.ones(2).double())
        optimizer = optim.Adam([{"params": first.parameters()}, {"params": second.parameters(), "lr": 0.05}], lr=0.01)
        if pack:
            first, second = packed(first, optimizer), packed(second, optimizer)
        optimizer.add_param_group({"params": [scale]})
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.mse_loss(first(X) + scale * second(X), Y).backward()
            optimizer.step()
        return first, second, optimizer

    (first, second, moved), (model, other, optimizer) = pair(True), pair(False)
    assert [len(group["params"]) for group in moved.param_groups] == [8, 8, 1]
    assert_same_models(first, model)
    assert_same_models(second, other)
    assert_same_states(moved, optimizer)
    moved.load_state_dict(optimizer.state_dict())
    assert_same_states(moved, optimizer)


class LAMB(optim.Adam):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda m: optim.LBFGS(m.parameters()),
        lambda m: optim.Adafactor(m.parameters()),
        lambda m: optim.SparseAdam(m.parameters()),
        lambda m: optim.Muon([m.stem.weight]),
        lambda m: LAMB(m.parameters()),
    ],
)
def test_what_looks_at_whole_parameters_is_refused_by_name(make: Callable[[Any], optim.Optimizer]) -> None:
    model = model_of()
    optimizer = make(model)
    before = list(optimizer.param_groups[0]["params"])
    with pytest.raises(
        pcr_fx.UnsupportedError, match=f"^{type(optimizer).__name__} is not known to update each number"
    ):
        packed(model, optimizer)
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], before, strict=True))


def test_optimizers_that_do_not_fit_are_refused() -> None:
    model = model_of()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(pcr_fx.UnsupportedError, match="goes with pack_parameters=True"):
        pcr_fx.transform(model, X, QUICK, optimizer=optimizer)
    with pytest.raises(pcr_fx.UnsupportedError, match=r"must be a torch\.optim\.Optimizer, got generator"):
        packed(model, model.parameters())
    with pytest.raises(pcr_fx.UnsupportedError, match="none of the parameters of the SGD is one of the model"):
        packed(model_of(), optimizer)


def test_states_that_do_not_fit_are_not_loaded() -> None:
    model = model_of()
    moved = optim.Adam(model.parameters())
    fast = packed(model, moved)
    train(fast, moved, 1)
    state: Any = moved.state_dict()
    with pytest.raises(ValueError, match=r"has 8 parameters in group 0, and 40 are expected: the model's"):
        moved.load_state_dict(optim.Adam(fast.parameters()).state_dict())
    state["state"][7]["step"] += 1
    with pytest.raises(
        pcr_fx.UnsupportedError, match=r"packed\.blocks_inner_bias cannot be packed: they differ in step, 1 and 2"
    ):
        moved.load_state_dict(state)
    state["state"][7]["step"] -= 1
    state["state"][7]["exp_avg"] = torch.zeros(5)
    with pytest.raises(pcr_fx.UnsupportedError, match=r"exp_avg is of shape \[5\], and they have the shape \[4\]"):
        moved.load_state_dict(state)
    expected: Tensor = fast.packed.blocks_inner_bias.detach().clone()
    torch.testing.assert_close(fast.packed.blocks_inner_bias.detach(), expected)
