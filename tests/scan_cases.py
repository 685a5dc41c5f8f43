"""Loops, some drawn at random, and a plain Python loop to compare them with."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comparison import relative_error
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Step = Callable[[Any, Any], tuple[Any, Any]]
F64 = torch.float64
# What is the same whatever runs the chain is not compiled for it.
IN_OPS = {"kernels": False, "planning": "estimated"}


def plain_loop(
    step: Step, init: Any, xs: Any, *, dim: int = 0, length: int | None = None, reverse: bool = False
) -> tuple[Any, Any]:
    """What a loop in Python makes of at least one step."""
    leaves, spec = pytree.tree_flatten(xs)
    parts = [None if leaf is None else leaf.unbind(dim) for leaf in leaves]
    count = next((len(part) for part in parts if part is not None), length)
    assert count
    carry, each = init, []
    for index in reversed(range(count)) if reverse else range(count):
        x = pytree.tree_unflatten([None if part is None else part[index] for part in parts], spec)
        carry, y = step(carry, x)
        each.append(pytree.tree_flatten(y))
    stacked = []
    for column in zip(*(flat for flat, _ in (reversed(each) if reverse else each)), strict=True):
        if column[0] is None:
            stacked.append(None)
        else:
            whole = torch.stack(column)
            stacked.append(whole.movedim(0, dim) if 0 < dim < whole.ndim else whole)
    return carry, pytree.tree_unflatten(stacked, each[0][1])


@dataclass
class Drawn:
    """A loop that was drawn.

    Attributes:
        step: closes over `weights`.
        words: what it is made of.
    """

    step: Step
    init: Any
    xs: Any
    weights: list[Tensor]
    dim: int
    reverse: bool
    length: int
    words: str

    @property
    def leaves(self) -> list[Tensor]:
        """All that a gradient may be asked of."""
        every = [*pytree.tree_leaves((self.init, self.xs)), *self.weights]
        return [leaf for leaf in every if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def draw(seed: int, lengths: tuple[int, ...] = (1, 2, 7, 64)) -> Drawn:
    """A loop in float64: one of a few kinds of steps and of outputs, in a structure, along a dimension."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    length, batch, size = choose.choice(lengths), choose.choice(((), (1,), (3,), (8,))), choose.choice((1, 2, 5))
    dim, reverse = choose.choice((0, 0, 1)), choose.random() < 0.4
    dim = min(dim, len(batch) + 0)

    def real(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    weights = [
        (real(size, size).detach() / (2 * size**0.5)).requires_grad_(),
        (0.1 * real(size).detach()).requires_grad_(),
    ]
    scale, flag = choose.choice((0.5, 1.0)), choose.random() < 0.5
    kind = choose.choice(("tanh", "gated", "pair", "shift", "relu", "counted"))
    says = choose.choice(("nothing", "state", "readout", "before", "several", "mask", "input"))
    shaped = choose.choice(("tensor", "tuple", "dict"))
    x = real(length, *batch, size).movedim(0, dim).detach().requires_grad_()
    whole = torch.randint(0, 3, x.shape)

    def advance(h: Tensor, u: Tensor) -> Tensor:
        mixed = h @ weights[0].T + weights[1] + u
        if kind == "relu":
            return scale * torch.relu(mixed) + 0.1 * h
        if kind == "gated":
            gate = torch.sigmoid(mixed)
            return gate * h + (1 - gate) * torch.tanh(u)
        return torch.tanh(mixed) * scale if flag else torch.tanh(mixed)

    def report(old: Tensor, new: Tensor, u: Tensor) -> Any:
        return {
            "nothing": None,
            "state": new,
            "readout": new.sum(-1),
            "before": old,
            "several": {"a": torch.sin(new), "b": (old * u, None)},
            "mask": (new > 0, new * 2),
            "input": (u, new),
        }[says]

    if kind == "pair":
        first, second = real(*batch, size), real(*batch, size)
        init: Any = {"v": second, "h": first} if shaped == "dict" else (first, second)

        def step(carry: Any, given: Any) -> tuple[Any, Any]:
            u = given["u"] if shaped == "dict" else given
            h, v = (carry["h"], carry["v"]) if shaped == "dict" else carry
            new = advance(h, u) + 0.1 * v
            after = {"v": 0.9 * v + h, "h": new} if shaped == "dict" else (new, 0.9 * v + h)
            return after, report(h, new, u)

    elif kind == "shift":
        init = (real(*batch, size), real(*batch, size))

        def step(carry: Any, given: Any) -> tuple[Any, Any]:
            u = given["u"] if shaped == "dict" else given
            h, previous = carry
            new = advance(h, previous)
            return (new, u), report(h, new, u)

    elif kind == "counted":
        init = (real(*batch, size), torch.tensor(3))

        def step(carry: Any, given: Any) -> tuple[Any, Any]:
            u = given["u"] if shaped == "dict" else given
            h, count = carry
            new = advance(h, u) + 0.01 * count
            return (new, count + 1), report(h, new, u)

    else:
        init = real(*batch, size)

        def step(carry: Any, given: Any) -> tuple[Any, Any]:
            u = given["u"] if shaped == "dict" else given
            new = advance(carry, u)
            return new, report(carry, new, u)

    xs: Any = {"u": x, "k": whole} if shaped == "dict" else x
    words = f"{kind}, {says}, {shaped}, T={length}, batch={batch}, d={size}, dim={dim}, reverse={reverse}"
    return Drawn(step, init, xs, weights, dim, reverse, length, words)


def assert_same(got: Any, expected: Any, leaves: list[Tensor] | tuple[Tensor, ...] = (), error: float = 1e-9) -> None:
    """The same structure, values and gradients."""
    ours, theirs = pytree.tree_flatten(got), pytree.tree_flatten(expected)
    assert ours[1] == theirs[1]
    pairs = [(a, b) for a, b in zip(ours[0], theirs[0], strict=True) if b is not None]
    assert all(a is None for a, b in zip(ours[0], theirs[0], strict=True) if b is None)
    for a, b in pairs:
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert relative_error(a, b) < error if b.is_floating_point() else torch.equal(a, b)
    if not leaves:
        return
    moving = [(a, b) for a, b in pairs if b.requires_grad]
    assert all(a.requires_grad for a, _ in moving)
    weights = [torch.randn_like(b) for _, b in moving]
    for gradient, true in zip(
        torch.autograd.grad([a for a, _ in moving], leaves, weights, allow_unused=True, materialize_grads=True),
        torch.autograd.grad([b for _, b in moving], leaves, weights, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        assert relative_error(gradient, true) < error


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64).requires_grad_()


class Cell(nn.Module):
    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(size, size, dtype=F64) / 3)
        self.gain = 1.0

    def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h @ self.w.T + self.gain * x)
        return h, h.sum(-1)
