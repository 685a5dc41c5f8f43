"""Copies of a model that are run alike, and their results compared with a reference."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pcr_fx.errors import UnsupportedError
from pcr_fx.options import Options

SEED = 0
# What is allowed: so many times the error of the model's own ops, and so many roundings of its dtype.
_TIMES_OWN, _ROUNDINGS = 10.0, 10.0
# And so many times a tolerance that the user set.
_TIMES_TOLERANCE = 100.0
# Gradients are compared relative to the largest number of each, or to this share of the largest of all where that is more.
_SMALLEST_SHARE = 1e-3
# Calls with gradients, whose results are compared: the first may go another way than all others.
_CALLS = 2


@dataclass(frozen=True)
class Errors:
    """How far results are from the reference, each relative to the largest number of the tensor.

    Attributes:
        outputs: the largest error of an output.
        gradients: the largest error of a gradient; `None` where nothing has one.
        worst: the tensor that is furthest from what is allowed.
        share: its error as a share of what is allowed; above 1 it is wrong.
    """

    outputs: float
    gradients: float | None
    worst: str
    share: float

    @property
    def are_allowed(self) -> bool:
        """Whether all tensors are as close to the reference as can be expected."""
        return self.share <= 1


class Results(NamedTuple):
    """What calls gave, by name."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


class Runner:
    """A copy of a model, and of its inputs.

    Args:
        dtype: what floating tensors are to be.
        made: makes what is called of the copy.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[Any],
        dtype: torch.dtype | None = None,
        made: Callable[[nn.Module], Callable[..., Any]] = lambda model: model,
    ) -> None:
        try:
            self.model = copy.deepcopy(model)
        except Exception as error:
            raise UnsupportedError(f"verify works on copies, and {type(model).__name__} has none: {error}") from error
        if dtype is not None:
            self.model.to(dtype)
        self.inputs = pytree.tree_map_only(Tensor, lambda one: _copied(one, dtype), tuple(inputs))
        leaves = pytree.tree_leaves(self.inputs)
        self.moving: dict[str, Tensor] = {name: one for name, one in self.model.named_parameters() if one.requires_grad}
        self.moving |= {
            f"input {number}": one for number, one in enumerate(leaves) if isinstance(one, Tensor) and one.requires_grad
        }
        self.run = made(self.model)

    def results(self, seed: int = SEED) -> Results:
        """Of all calls that are compared."""
        found = Results({}, {})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for call in range(1, _CALLS + 1):
                outputs, gradients = self.step()
                found.outputs.update({f"{name} of call {call}": one for name, one in outputs.items()})
                found.gradients.update({f"{name} of call {call}": one for name, one in gradients.items()})
            with torch.no_grad():
                outputs = self._outputs()
            found.outputs.update({f"{name} without gradients": one for name, one in outputs.items()})
        return found

    def step(self) -> Results:
        """A call with its gradients."""
        with torch.enable_grad():
            outputs = self._outputs()
            seeds = {name: one for name, one in outputs.items() if one.requires_grad}
            if not seeds or not self.moving:
                return Results({name: one.detach() for name, one in outputs.items()}, {})
            cotangents = [_drawn(one) for one in seeds.values()]
            pulled = torch.autograd.grad(
                list(seeds.values()), list(self.moving.values()), cotangents, allow_unused=True
            )
        gradients = {
            f"the gradient of {name}": torch.zeros_like(one) if found is None else found
            for (name, one), found in zip(self.moving.items(), pulled, strict=True)
        }
        return Results({name: one.detach() for name, one in outputs.items()}, gradients)

    def forward(self) -> Any:
        """A call without gradients."""
        with torch.no_grad():
            return self.run(*self.inputs)

    def _outputs(self) -> dict[str, Tensor]:
        leaves = [one for one in pytree.tree_leaves(self.run(*self.inputs)) if isinstance(one, Tensor)]
        return {f"output {number}": one for number, one in enumerate(leaves)}


def _copied(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    made = tensor.detach().clone()
    if dtype is not None and made.is_floating_point():
        made = made.to(dtype)
    return made.requires_grad_(tensor.requires_grad)


def _drawn(tensor: Tensor) -> Tensor:
    """The same numbers for each tensor of a shape, whatever its dtype."""
    generator = torch.Generator().manual_seed(SEED)
    numbers = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return numbers.to(tensor.dtype).to(tensor.device)


class Judge:
    """Compares results with a reference.

    Args:
        own: the results of the model as it is.
        is_exact: whether the reference is far more precise than these.
        options: whose tolerance is allowed for.
    """

    def __init__(self, truth: Results, own: Results, is_exact: bool, options: Options) -> None:
        self.truth, self.own, self.is_exact = truth, own, is_exact
        self.forgiven = _TIMES_TOLERANCE * (options.tolerance or 0.0)
        largest = max(map(_largest, truth.gradients.values()), default=0.0)
        self.scales = {name: _largest(one) or 1.0 for name, one in truth.outputs.items()}
        for name, one in truth.gradients.items():
            self.scales[name] = max(_largest(one), _SMALLEST_SHARE * largest) or 1.0

    def errors(self, found: Results) -> Errors:
        """How far results are from the reference."""
        outputs = {name: self._error(one, name) for name, one in found.outputs.items()}
        gradients = {name: self._error(one, name) for name, one in found.gradients.items()}
        every = outputs | gradients
        missing = [name for name in (*self.truth.outputs, *self.truth.gradients) if name not in every]
        if missing:
            return Errors(math.inf, None, f"{missing[0]}, which is missing", math.inf)
        shares = {name: _share(error, self._allowed(name)) for name, error in every.items()}
        worst = max(shares, key=shares.__getitem__, default="nothing")
        return Errors(
            max(outputs.values(), default=0.0), max(gradients.values(), default=None), worst, shares.get(worst, 0.0)
        )

    def _error(self, found: Tensor, name: str) -> float:
        truth = self.truth.outputs.get(name, self.truth.gradients.get(name))
        if truth is None or found.shape != truth.shape:
            return math.inf
        wide = torch.complex128 if truth.is_complex() else torch.float64
        a, b = found.to(wide), truth.to(wide)
        same = (a == b) | (a.isnan() & b.isnan())
        error = torch.where(same, 0.0, (a - b).abs()).nan_to_num(math.inf, math.inf)
        return float(error.max()) / self.scales[name] if error.numel() else 0.0

    def _allowed(self, name: str) -> float:
        own = self.own.outputs.get(name, self.own.gradients.get(name))
        assert own is not None
        exact = not (own.is_floating_point() or own.is_complex())
        rounding = 0.0 if exact else torch.finfo(own.dtype).eps
        if not self.is_exact:
            return math.sqrt(rounding) + self.forgiven
        return _TIMES_OWN * self._error(own, name) + _ROUNDINGS * rounding + self.forgiven


def _largest(tensor: Tensor) -> float:
    """The largest finite number."""
    sizes = tensor.abs().double().nan_to_num(0.0, 0.0, 0.0)
    return float(sizes.max()) if sizes.numel() else 0.0


def _share(error: float, allowed: float) -> float:
    if error <= allowed:
        return error / allowed if 0 < allowed < math.inf else 0.0
    return error / allowed if allowed > 0 else math.inf
