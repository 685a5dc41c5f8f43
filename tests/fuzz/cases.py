"""A random model as text that runs by itself, and what is smaller than it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fuzz.ops import OPERANDS, OPS, PLAIN

SHAPES = ["4", "4", "4", "2, 4", "2, 3, 4"]
# How the initial state and the inputs lie in memory; `{}` is a tensor as it is.
STRIDES = [
    *["{}"] * 4,
    "{}[:1].expand_as({})",
    "torch.cat([{}, {}], -1)[..., ::2]",
    "{}.transpose(0, -1).contiguous().transpose(0, -1)",
    "{}.flip(0)",
    "({}.contiguous(memory_format=torch.channels_last) if {}.dim() == 4 else {})",
]


@dataclass(frozen=True)
class Line:
    """`name = template.format(*arguments)`, of a kind as in `ops.py`."""

    name: str
    template: str
    arguments: tuple[str, ...]
    kind: str

    def __str__(self) -> str:
        return f"{self.name} = {self.template.format(*self.arguments)}"


@dataclass(frozen=True)
class Case:
    """A model and a call of it.

    Attributes:
        lines: of one block, from the state `z`, the second state `y`, the state before `z1` and the operands.
        shape: of a state, behind the batch.
        strides: of the initial state and the inputs.
        tapped: blocks whose state is an output too.
        seed: of all numbers.
    """

    lines: tuple[Line, ...]
    second: str
    length: int
    batch: int
    shape: str
    dtype: str
    strides: tuple[str, str]
    tapped: tuple[int, ...]
    seed: int

    @property
    def result(self) -> str:
        return next((line.name for line in reversed(self.lines) if line.kind == "r"), "z")

    def source(self) -> str:
        """`Model`, its `inputs(dtype)`, and `step`, by which it goes from block to block."""
        block = "\n    ".join(map(str, self.lines))
        laid = [
            stride.format(*[name] * stride.count("{}")) for stride, name in zip(self.strides, ("x", "xs"), strict=True)
        ]
        return f"""
import torch
import torch.nn.functional as F
from torch import nn

def step(states, block, shared):
    (z, y, z1), (a, b, x, mask, k), (s, u, order) = states, block, shared
    {block or "pass"}
    return 0.5 * z + 0.4 * torch.tanh({self.result}), ({self.second}).expand_as(z), z

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed({self.seed})
        self.a = nn.ParameterList([torch.randn(4, 4) / 2 for _ in range({self.length})])
        self.b = nn.ParameterList([torch.randn(4) for _ in range({self.length})])
        self.s, self.u = nn.Parameter(torch.randn(4, 4) / 2), nn.Parameter(torch.rand(2, 4))
        self.register_buffer("mask", torch.rand({self.length}, 4) > 0.5)
        self.register_buffer("order", torch.randperm(4))

    def block(self, t, xs):
        return self.a[t], self.b[t], xs[t], self.mask[t], 0.1 * t - 0.3

    def forward(self, x, xs):
        states, taps = (x, 0.5 * x, x), []
        for t in range({self.length}):
            states = step(states, self.block(t, xs), (self.s, self.u, self.order))
            if t in {self.tapped!r}:
                taps.append(states[0])
        return (*states[:2], *taps)

def inputs(dtype):
    torch.manual_seed({self.seed + 1})
    x, xs = torch.randn({self.batch}, {self.shape}).to(dtype), torch.randn({self.length}, {self.batch}, {self.shape}).to(dtype)
    return {laid[0]}, {laid[1]}
"""

    def build(self) -> dict[str, Any]:
        names: dict[str, Any] = {}
        exec(compile(self.source(), f"<case {self.seed}>", "exec"), names)
        return names

    # --- smaller ones ---

    def smaller(self) -> Iterator[Case]:
        """Cases with one thing less."""
        for index in reversed(range(len(self.lines))):
            yield from self._without(index)
        if self.second != "y":
            yield replace(self, second="y")
        for length in {self.length // 2, self.length - 1}:
            if 2 <= length < self.length:
                yield replace(self, length=length, tapped=tuple(tap for tap in self.tapped if tap < length))
        if self.tapped:
            yield replace(self, tapped=self.tapped[1:])
        if self.strides != ("{}", "{}"):
            yield replace(self, strides=("{}", "{}"))
        if self.shape != "4":
            yield replace(self, shape="4")
        if self.batch > 1:
            yield replace(self, batch=1)
            yield replace(self, batch=self.batch - 1)

    def _without(self, index: int) -> Iterator[Case]:
        """A line left out: its users read one of its arguments, or a plain value of its kind."""
        gone, rest = self.lines[index], (*self.lines[:index], *self.lines[index + 1 :])
        kinds = {line.name: line.kind for line in self.lines} | {"z": "r"}
        for other in dict.fromkeys([PLAIN[gone.kind], *(a for a in gone.arguments if kinds.get(a) == gone.kind)]):
            lines = tuple(
                replace(line, arguments=tuple(other if a == gone.name else a for a in line.arguments)) for line in rest
            )
            yield replace(self, lines=lines, second=other if self.second == gone.name else self.second)


def draw(seed: int) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    known: dict[str, list[str]] = {"r": ["z", "z", "z"], "c": [], "m": [], "w": []}
    lines: list[Line] = []
    if rng.randrange(8):  # a product in front couples the features, as in most models
        lines.append(Line("v0", rng.choice(["{0} @ a", "F.linear({0}, a, b)"]), ("z",), "r"))
        known["r"] += ["v0"] * 3
    for _ in range(rng.randint(1, 8)):
        template, kinds, kind = rng.choice([op for op in OPS if all(known[k] or k in OPERANDS for k in op[1])])
        arguments = tuple(_argument(rng, known, k) for k in kinds)
        name = f"v{len(lines)}"
        lines.append(Line(name, template, arguments, kind))
        known[kind] += [name] * 3  # later ones more often
    length = rng.choice([2, 3, 3, 4, 5, 5, 8, 11])
    return Case(
        tuple(lines),
        rng.choice(["y", "z", "0.3 * y + 0.2 * z1", *(line.name for line in lines if line.kind == "r")]),
        length,
        rng.choice([1, 2, 3, 5, 9, 17]),
        rng.choice(SHAPES),
        rng.choice(["float64", "float32", "float32"]),
        (rng.choice(STRIDES), rng.choice(STRIDES)),
        tuple(sorted(rng.sample(range(length), rng.choice([0, 0, 1, 2])))),
        seed,
    )


def _argument(rng: random.Random, known: dict[str, list[str]], kind: str) -> str:
    if known[kind] and (kind not in OPERANDS or rng.randrange(3)):
        return rng.choice(known[kind][-9:])
    return rng.choice(OPERANDS[kind])
