"""Random scripts of changes, made to a transformed module and to a plain copy of its model alike.

    python -m tests.changes --scripts 500 --seed 1

After each change the two agree in values, gradients and state, or an error of the package says why not. What fails is printed
with the number of its script, which `--only` runs again.
"""

from __future__ import annotations

import argparse
import copy
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import pcr_fx

QUICK = {"kernels": False, "planning": "estimated", "min_length": 4}
WIDTH = 3
Draw = random.Random


class Block(nn.Module):
    usual = 1.0

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale, self.on, self.config, self.factors = 0.5, True, config, {"a": 1.0, "rest": [1.0, 2.0]}
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.act: Callable[[Tensor], Tensor] = torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        y = self.outer(self.act(self.inner(x) - self.mean)) * self.factors["a"] * self.factors["rest"][1]
        return x + self.scale * self.usual * self.config.gain * y if self.on else x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(gain=1.0, steps=2)
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block(self.config) for _ in range(6)])
        self.cell = nn.GRUCell(WIDTH, WIDTH)
        self.tail = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.0), nn.Tanh())
        self.loose = [nn.Parameter(torch.ones(WIDTH)), torch.ones(WIDTH)]
        self.dt = 0.1
        self.handles: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) * self.loose[0] + self.loose[1]
        for block in self.blocks:
            x = block(x)
        for _ in range(self.config.steps):
            x = x + self.dt * self.cell(x, x)
        return self.tail(x) * (2 if torch.is_grad_enabled() else 1)


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, value: Tensor) -> Tensor:
        return self.factor * value


# --- changes ------------------------------------------------------------------------------------------------------------


def block(model: Any, draw: Draw) -> Any:
    return model.blocks[draw.randrange(len(model.blocks))]


def linear(model: Any, draw: Draw) -> Any:
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    return layers[draw.randrange(len(layers))]


def number(draw: Draw) -> float:
    return draw.choice([0.25, 0.5, 1.0, -0.5])


def values(draw: Draw, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(draw.randrange(1000)), dtype=torch.float64) / 3


def new_block(model: Any, draw: Draw) -> Block:
    torch.manual_seed(draw.randrange(1000))
    return Block(model.config).to(model.stem.weight.dtype)


def scale_result(module: Any, given: Any, result: Any) -> Any:
    return 0.5 * result


def scale_input(module: Any, given: Any) -> Any:
    return 0.5 * given[0]


def look(module: Any, given: Any, result: Any) -> None:
    module.seen = [*module.__dict__.get("seen", []), float(result.detach().sum())]


def hook(model: Any, draw: Draw) -> None:
    module = draw.choice([block, linear])(model, draw)
    scale_gradient: Any = lambda module, to, by: tuple(None if g is None else 0.5 * g for g in to)  # noqa: E731
    make = draw.choice(
        [
            lambda: module.register_forward_hook(scale_result, prepend=draw.random() < 0.5),
            lambda: module.register_forward_hook(look),
            lambda: module.register_forward_pre_hook(scale_input),
            lambda: module.register_full_backward_hook(scale_gradient),
            lambda: module.register_full_backward_pre_hook(lambda module, by: tuple(2 * g for g in by)),
        ]
    )
    model.handles.append(make())


def unhook(model: Any, draw: Draw) -> None:
    if model.handles:
        model.handles.pop(draw.randrange(len(model.handles))).remove()


def parametrize_one(model: Any, draw: Draw) -> None:
    parametrize.register_parametrization(linear(model, draw), draw.choice(["weight", "bias"]), Scaled(number(draw)))


def parametrize_all(model: Any, draw: Draw) -> None:
    for each in model.blocks:
        if type(each.inner) is nn.Linear:
            parametrize.register_parametrization(each.inner, "weight", Scaled(0.5))


def unparametrize(model: Any, draw: Draw) -> None:
    for module in model.modules():
        if parametrize.is_parametrized(module):
            return parametrize.remove_parametrizations(module, next(iter(module.parametrizations)))


def prune_one(model: Any, draw: Draw) -> None:
    prune.l1_unstructured(linear(model, draw), "weight", 0.4)


def unprune(model: Any, draw: Draw) -> None:
    for module in model.modules():
        if prune.is_pruned(module) and any(
            isinstance(h, prune.BasePruningMethod) for h in module._forward_pre_hooks.values()
        ):
            return prune.remove(module, "weight")


def optimise(model: Any, draw: Draw) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data.sub_(0.1 * parameter.grad)


def patch(model: Any, draw: Draw) -> None:
    chosen = block(model, draw)
    chosen.forward = MethodType(lambda self, x: x + 0.1 * self.inner(x), chosen)


def exchange(model: Any, draw: Draw) -> None:
    layer = linear(model, draw)
    layer.weight = nn.Parameter(values(draw, *layer.weight.shape).to(layer.weight.dtype), draw.random() < 0.7)


def tie(model: Any, draw: Draw) -> None:
    linear(model, draw).weight = model.blocks[0].inner.weight


def load(model: Any, draw: Draw) -> None:
    factor = number(draw)
    state = {
        name: value.clone() * factor if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state, assign=draw.random() < 0.5)


def move(model: Any, draw: Draw) -> None:
    model.to(draw.choice([torch.float32, torch.float64]))


CHANGES: list[Callable[[Any, Draw], Any]] = [
    hook,
    hook,
    unhook,
    parametrize_one,
    parametrize_all,
    unparametrize,
    prune_one,
    unprune,
    optimise,
    patch,
    exchange,
    tie,
    load,
    move,
    lambda m, draw: setattr(block(m, draw), "scale", number(draw)),
    lambda m, draw: setattr(block(m, draw), "on", draw.random() < 0.5),
    lambda m, draw: setattr(block(m, draw), "act", draw.choice([torch.sin, torch.tanh])),
    lambda m, draw: setattr(block(m, draw), "usual", number(draw)),
    lambda m, draw: block(m, draw).__dict__.pop("unread", None),
    lambda m, draw: setattr(block(m, draw), "unread", number(draw)),
    lambda m, draw: setattr(m.config, "gain", number(draw)),
    lambda m, draw: setattr(m.config, "steps", draw.randrange(1, 7)),
    lambda m, draw: setattr(m, "dt", number(draw)),
    lambda m, draw: block(m, draw).factors.update(a=number(draw)),
    lambda m, draw: block(m, draw).factors["rest"].__setitem__(1, number(draw)),
    lambda m, draw: setattr(block(m, draw), "factors", {"a": number(draw), "rest": [0, number(draw)]}),
    lambda m, draw: m.blocks.__setitem__(draw.randrange(len(m.blocks)), new_block(m, draw)),
    lambda m, draw: m.blocks.insert(draw.randrange(len(m.blocks)), new_block(m, draw)),
    lambda m, draw: m.blocks.append(new_block(m, draw)),
    lambda m, draw: m.blocks.__delitem__(draw.randrange(len(m.blocks))) if len(m.blocks) > 3 else None,
    lambda m, draw: m.blocks.append(m.blocks[0]),
    lambda m, draw: setattr(block(m, draw), "inner", nn.Identity()),
    lambda m, draw: m.tail.append(nn.Sigmoid()),
    lambda m, draw: setattr(m.tail[2], "p", float(draw.randrange(2))),
    lambda m, draw: block(m, draw).requires_grad_(draw.random() < 0.5),
    lambda m, draw: m.cell.requires_grad_(draw.random() < 0.5),
    lambda m, draw: setattr(block(m, draw), "mean", values(draw, WIDTH).to(m.stem.weight.dtype)),
    lambda m, draw: block(m, draw).mean.add_(0.1),
    lambda m, draw: m.loose.__setitem__(draw.randrange(2), nn.Parameter(values(draw, WIDTH).to(m.stem.weight.dtype))),
    lambda m, draw: m.loose[1].data.mul_(2),
    lambda m, draw: linear(m, draw).register_parameter("bias", None),
    lambda m, draw: m.train(draw.random() < 0.5),
    lambda m, draw: block(m, draw).train(draw.random() < 0.5),
]


# --- running ------------------------------------------------------------------------------------------------------------


def run_script(number: int, seed: int) -> str:
    """Run one; what it ended with, in words.

    Raises:
        AssertionError: the two differ.
    """
    draw = random.Random(f"{seed} {number}")
    torch.manual_seed(number)
    model = Net().double()
    for change in draw.choices(CHANGES, k=draw.randrange(3)):
        apply(change, model, random.Random(draw.random()))
    packed = draw.random() < 0.25
    twin = copy.deepcopy(model) if not any(map(has_computed_weights, model.modules())) else None
    if twin is None:
        return "not copied"
    try:
        fast = pcr_fx.transform(twin, inputs(model, draw), QUICK, pack_parameters=packed)
        fast.handles, model.handles = [], []
        agree(fast, model, draw)
        for _ in range(draw.randrange(2, 7)):
            step(fast, model, draw, packed)
    except pcr_fx.PcrFxError as error:
        return "refused: " + re.sub(r"[\w.]*\d[\w.]*", "...", str(error))[:120]
    return "packed" if packed else "followed"


def has_computed_weights(module: nn.Module) -> bool:
    return any(isinstance(value, Tensor) and not value.is_leaf for value in module.__dict__.values())


def apply(change: Callable[[Any, Draw], Any], model: Any, draw: Draw) -> Exception | None:
    """Make a change; the error if that fails."""
    try:
        change(model, draw)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, pcr_fx.PcrFxError) as error:
        return error
    return None


def step(fast: Any, model: Any, draw: Draw, packed: bool) -> None:
    change, seed = draw.choice(CHANGES), draw.random()
    failures = [apply(change, module, random.Random(seed)) for module in (fast, model)]
    if failures[0] is not None and failures[1] is None:
        if packed:  # parts of a packed parameter are no parameters, as PyTorch itself may say
            raise pcr_fx.PcrFxError(str(failures[0]))
        raise AssertionError(f"a change fails: {failures[0]!r}") from failures[0]
    agree(fast, model, draw)


def inputs(model: Any, draw: Draw) -> Tensor:
    return values(draw, draw.randrange(2, 5), WIDTH).to(model.stem.weight.dtype)


def agree(fast: Any, model: Any, draw: Draw) -> None:
    """Values, gradients and state of both are the same, or both raise."""
    x, no_grad, results = inputs(model, draw), draw.random() < 0.3, []
    for module in (fast, model):
        try:
            results.append(observe(module, x.clone(), no_grad))
        except (RuntimeError, TypeError, AttributeError) as error:
            if isinstance(error, pcr_fx.PcrFxError):
                raise
            results.append(type(error))
    if hasattr(fast, "packed") and isinstance(results[1], dict):
        results[1] = {name: value for name, value in results[1].items() if not name.startswith("gradient")}
    if all(isinstance(result, type) for result in results):
        return  # the model itself is broken by now
    tolerance = 1e-9 if x.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance, equal_nan=True)


def observe(module: Any, x: Tensor, no_grad: bool) -> dict[str, Any]:
    for parameter in module.parameters():
        parameter.grad = None
    torch.manual_seed(0)
    with torch.set_grad_enabled(not no_grad):
        y = module(x if no_grad else x.requires_grad_())
    if not no_grad:
        y.square().sum().backward()
    seen = [value for each in module.modules() for value in each.__dict__.get("seen", [])]
    parameters = [] if hasattr(module, "packed") else module.named_parameters()
    return {
        "y": y.detach(),
        "x": x.grad,
        "seen": seen,
        **{f"gradient of {name}": parameter.grad for name, parameter in parameters},
        **{f"state {name}": value.clone() for name, value in module.state_dict().items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scripts", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="run this script alone, and let its error through")
    chosen = parser.parse_args()
    if chosen.only is not None:
        print(run_script(chosen.only, chosen.seed))
        return 0
    ends: Counter[str] = Counter()
    for script in range(chosen.scripts):
        try:
            ends[run_script(script, chosen.seed)] += 1
        except Exception as error:
            ends["failed"] += 1
            print(f"script {script}: {type(error).__name__}: {str(error).strip()[:300]}", flush=True)
    for word, count in ends.most_common():
        print(f"{count:5} {word}")
    return int(ends["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
