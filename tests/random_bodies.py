"""Random bodies that keep the shape of their states, for what a proof claims of them."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from batch_bodies import Shape, tensors
from torch import Tensor

[numbers] = tensors((100_000,))
SHAPES: list[Shape] = [
    (5,), (3, 4), (4, 4), (1, 4), (6, 1), (2, 3, 4), (3, 3, 3), (2, 2, 6), (2, 1, 3), (1, 1, 2), (2, 3, 2, 2),
]  # fmt: skip


class Composer:
    """Random bodies that keep the shape of their states: steps along dimensions, detours by other shapes."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.depth = 0

    def __call__(self, *states: Tensor) -> tuple[Tensor, ...]:
        states = tuple(self.steps(state) for state in states)
        return tuple(self.steps(self.pick([state, state * states[0], state + states[-1]])) for state in states)

    def steps(self, x: Tensor) -> Tensor:
        self.depth += 1
        detours = [self.detour] * 3 if self.depth < 4 else []
        kinds = [self.along, self.product, self.write, *[self.elementwise] * 2, *detours]
        for _ in range(self.pick([1, 1, 2])):
            x = self.pick(kinds)(x)
        self.depth -= 1
        return x

    def dimension(self, x: Tensor) -> int:
        """More often the last, so that most bodies keep some dimension."""
        return self.pick([x.ndim - 1, x.ndim - 1, self.random.randrange(x.ndim)])

    def pick(self, values: Sequence[Any]) -> Any:
        return values[self.random.randrange(len(values))]

    def constant(self, *shape: int) -> Tensor:
        start = self.random.randrange(100)
        return 0.5 * numbers[start : start + max(torch.Size(shape).numel(), 1)].view(shape)

    def elementwise(self, x: Tensor) -> Tensor:
        sizes = [self.pick([1, size]) for size in x.shape][self.random.randrange(x.ndim + 1) :]
        other = self.constant(*sizes)
        return self.pick([torch.tanh(x), x * other, x + other, torch.where(x > other, x, other), torch.atan2(x, other)])

    def along(self, x: Tensor) -> Tensor:
        dim, name = self.dimension(x), self.pick(sorted(ALONG))
        return ALONG[name](x, dim, self.random.randrange(x.shape[dim]))

    def product(self, x: Tensor) -> Tensor:
        products = [x @ self.constant(x.shape[-1], x.shape[-1])]
        if x.ndim >= 2:
            products.append(self.constant(x.shape[-2], x.shape[-2]) @ x)
            products.append((x @ x.mT).softmax(-1) @ x)
            products.append(F.layer_norm(x, x.shape[-1:]))
        if x.ndim >= 3:
            products.append(
                F.scaled_dot_product_attention(x, self.pick([x, 2 * x]), self.pick([x, self.constant(*x.shape)]))
            )
        if x.ndim == 3:
            products.append(F.conv1d(x, self.constant(x.shape[1], x.shape[1], 3), padding=1))
            products.append(torch.baddbmm(x, self.constant(len(x), x.shape[1], x.shape[1]), x))
        return self.pick(products)

    def write(self, x: Tensor) -> Tensor:
        y, dim = x.clone(), self.dimension(x)
        part = y.select(dim, self.random.randrange(x.shape[dim]))
        self.pick(
            [
                lambda: part.mul_(3),
                lambda: part.add_(y.select(dim, 0).clone()),
                lambda: part.copy_(self.constant(*part.shape)),
                lambda: part.copy_(x.mean(dim)),
                lambda: y.narrow(dim, 0, 1).sigmoid_(),
            ]
        )()
        return y

    def detour(self, x: Tensor) -> Tensor:
        return self.pick([self.permuted, self.viewed, self.viewed, self.inserted, self.split, self.copied])(x)

    def permuted(self, x: Tensor) -> Tensor:
        order = self.random.sample(range(x.ndim), x.ndim)
        back = sorted(range(x.ndim), key=order.__getitem__)
        return self.steps(x.permute(order)).permute(self.pick([back, back, back, list(range(x.ndim))])).reshape(x.shape)

    def viewed(self, x: Tensor) -> Tensor:
        sizes = list(x.shape)
        if self.pick([True, False]) and x.ndim >= 2:  # join two
            dim = self.random.randrange(x.ndim - 1)
            sizes[dim : dim + 2] = [sizes[dim] * sizes[dim + 1]]
        elif self.pick([True, False]):  # split one
            dim = self.random.randrange(x.ndim)
            divisor = self.pick([i for i in range(1, sizes[dim] + 1) if sizes[dim] % i == 0])
            sizes[dim : dim + 1] = [divisor, sizes[dim] // divisor]
        else:
            self.random.shuffle(sizes)
        return self.steps(x.reshape(sizes)).reshape(x.shape)

    def inserted(self, x: Tensor) -> Tensor:
        dim, count = self.random.randrange(x.ndim + 1), self.random.randint(1, 3)
        wide = x.unsqueeze(dim)
        wide = self.pick(
            [
                lambda: wide.expand([count if i == dim else -1 for i in range(wide.ndim)]),
                lambda: torch.stack([x] * count, dim),
                lambda: torch.cat([wide * i for i in range(1, count + 1)], dim),
                lambda: wide.repeat([count if i == dim else 1 for i in range(wide.ndim)]),
            ]
        )()
        wide = self.steps(wide)
        return self.pick([wide.sum(dim), wide.amax(dim), wide.select(dim, 0), wide.unbind(dim)[-1]])

    def split(self, x: Tensor) -> Tensor:
        dim = self.dimension(x)
        parts = list(x.split(self.random.randint(1, x.shape[dim]), dim))
        parts[-1] = self.steps(parts[-1])
        return torch.cat(self.pick([parts, parts, parts[::-1]]), dim)

    def copied(self, x: Tensor) -> Tensor:
        dim = self.dimension(x)
        wide = self.steps(x.repeat([2 if i == dim else 1 for i in range(x.ndim)]))
        return wide.narrow(dim, self.random.randrange(x.shape[dim]), x.shape[dim])


ALONG: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "softmax": lambda x, dim, _: x.softmax(dim),
    "cumsum": lambda x, dim, _: x.cumsum(dim),
    "flip": lambda x, dim, _: x.flip(dim),
    "roll": lambda x, dim, index: x.roll(index, dim),
    "sort": lambda x, dim, _: x.sort(dim)[0],
    "centre": lambda x, dim, _: x - x.mean(dim, keepdim=True),
    "scale": lambda x, dim, _: x / (1 + x.norm(dim=dim, keepdim=True)),
    "largest": lambda x, dim, _: x + x.max(dim)[0].unsqueeze(dim),
    "broadcast": lambda x, dim, index: x + x.narrow(dim, index, 1),
    "select": lambda x, dim, index: x * x.select(dim, index).unsqueeze(dim),
    "rotate": lambda x, dim, index: torch.cat(
        [x.narrow(dim, index, x.shape[dim] - index), x.narrow(dim, 0, index)], dim
    ),
    "pad": lambda x, dim, _: F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [1, -1]),
    "gather": lambda x, dim, _: x.gather(dim, x.argsort(dim)),
    "index": lambda x, dim, index: x + x.index_select(dim, torch.tensor([index])),
    "transpose": lambda x, dim, index: x + x.transpose(dim, 0) if x.shape[dim] == x.shape[0] else x.exp(),
    "mean of all others": lambda x, dim, _: x + x.mean([i for i in range(x.ndim) if i != dim], keepdim=True),
    "glu": lambda x, dim, _: F.glu(torch.cat([x, x.exp()], dim), dim),
    "advanced": lambda x, dim, index: x + x[index % x.shape[0]],
}
