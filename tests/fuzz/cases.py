"""A random model as text that runs by itself, and what is smaller than it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fuzz import bodies, ops

PLAIN = ops.PLAIN | bodies.PLAIN

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
        further: names of states of `bodies.STATES`, and what each becomes.
        start: the states that the first block is given.
        around: how a block is called.
        prelude: what its lines call.
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
    further: tuple[tuple[str, str], ...] = ()
    start: str = "x, 0.5 * x, x"
    around: str = "step(states, block, shared, t)"
    prelude: str = ""

    @property
    def result(self) -> str:
        return next((line.name for line in reversed(self.lines) if line.kind == "r"), "z")

    def source(self) -> str:
        """`Model`, its `inputs(dtype)`, and `step`, by which it goes from block to block."""
        block = "\n    ".join(map(str, self.lines))
        laid = [
            stride.format(*[name] * stride.count("{}")) for stride, name in zip(self.strides, ("x", "xs"), strict=True)
        ]
        names = "".join(f", {name}" for name, _ in self.further)
        starts = "".join(f", {bodies.STATES[name][1]}" for name, _ in self.further)
        becomes = "".join(f", {value}" for _, value in self.further)
        if "None" in self.start:
            block = "y, z1 = (0.5 * z, z) if y is None else (y, z1)\n    " + block
        return f"""
import torch
import torch.nn.functional as F
from torch import nn
{self.prelude}
def step(states, block, shared, t=0):
    (z, y, z1{names}), (a, b, x, mask, words, k), (s, u, order, table) = states, block, shared
    {block or "pass"}
    return 0.5 * z + 0.4 * torch.tanh({self.result}), ({self.second}).expand_as(z), z{becomes}

def as_reals(states, dtype):
    return [torch.view_as_real(one) if one.is_complex() else one.to(dtype) for one in states]

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed({self.seed})
        self.a = nn.ParameterList([torch.randn(4, 4) / 2 for _ in range({self.length})])
        self.b = nn.ParameterList([torch.randn(4) for _ in range({self.length})])
        self.s, self.u = nn.Parameter(torch.randn(4, 4) / 2), nn.Parameter(torch.rand(2, 4))
        self.register_buffer("mask", torch.rand({self.length}, 4) > 0.5)
        self.register_buffer("order", torch.randperm(4))
        self.register_buffer("words", torch.randint(0, 4, ({self.length}, 4)))
        self.table = nn.Parameter(torch.rand(12, 4) - 0.5)

    def block(self, t, xs):
        return self.a[t], self.b[t], xs[t], self.mask[t], self.words[t], 0.1 * t - 0.3

    def forward(self, x, xs):
        states, taps, shared = ({self.start}{starts}), [], (self.s, self.u, self.order, self.table)
        for t in range({self.length}):
            block = self.block(t, xs)
            states = {self.around}
            if t in {self.tapped!r}:
                taps.append(states[0])
        return (*states[:2], *taps, *as_reals(states[3:], x.dtype))

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
        if self.further:
            yield replace(self, further=self.further[:-1])
        for name in ("start", "around"):
            if getattr(self, name) != getattr(Case, name):
                yield replace(self, **{name: getattr(Case, name)})
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
    _draw_lines(rng, known, lines, rng.randint(1, 8), ops.OPS, ops.OPERANDS)
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


def draw_body(seed: int) -> Case:
    """The case of a seed with what people write inside a block, of `bodies.py`; in a third of them something is random."""
    rng = random.Random(seed)
    known: dict[str, list[str]] = {kind: [] for kind in ops.PLAIN | bodies.PLAIN} | {"r": ["z"]}
    names = rng.sample(sorted(bodies.STATES), rng.choice([0, 0, 0, 1, 2]))
    for name in names:
        known[bodies.STATES[name][0]].append(name)
    around = rng.choice(["checkpoint", "autocast", "scaled"]) if rng.randrange(6) == 0 else ""
    # Other draws in another dtype, and by `torch.compile` in the second run of a checkpoint, which PyTorch's own backends do too.
    apart = ("autocast", "checkpoint")
    table = bodies.OPS + 3 * bodies.RANDOM if rng.randrange(3) == 0 and around not in apart else bodies.OPS
    lines: list[Line] = []
    _draw_lines(rng, known, lines, rng.randint(2, 6), table, bodies.OPERANDS)
    length = rng.choice([4, 5, 5, 6, 8, 11])
    plain = Case((), "y", length, rng.choice([1, 2, 3, 5]), rng.choice(SHAPES), "float64", ("{}", "{}"), (), seed)
    return replace(
        plain,
        lines=tuple(lines),
        second=rng.choice(["y", "z", *(line.name for line in lines if line.kind == "r")]),
        dtype="float32" if around == "autocast" else "float64",  # elsewhere it does nothing
        tapped=tuple(sorted(rng.sample(range(length), rng.choice([0, 0, 1])))),
        further=tuple((name, _becomes(rng, known, name)) for name in names),
        start=rng.choice(list(bodies.STARTS.values())) if rng.randrange(4) == 0 else plain.start,
        around=bodies.AROUND.get(around, plain.around),
        prelude=bodies.PRELUDE,
    )


def _becomes(rng: random.Random, known: dict[str, list[str]], name: str) -> str:
    kind, _, template = bodies.STATES[name]
    return template.format(rng.choice([one for one in known[kind] if one != name] or [PLAIN[kind]]))


def _draw_lines(
    rng: random.Random,
    known: dict[str, list[str]],
    lines: list[Line],
    count: int,
    table: Sequence[tuple[str, str, str]],
    operands: Mapping[str, Sequence[str]],
) -> None:
    """Adds lines of a table to those there are, and what they make to what is known."""
    for _ in range(count):
        template, kinds, kind = rng.choice([op for op in table if all(known[k] or k in operands for k in op[1])])
        arguments = tuple(_argument(rng, known, operands, k) for k in kinds)
        name = f"v{len(lines)}"
        lines.append(Line(name, template, arguments, kind))
        known[kind] += [name] * 3  # later ones more often


def _argument(rng: random.Random, known: dict[str, list[str]], operands: Mapping[str, Sequence[str]], kind: str) -> str:
    if known[kind] and (kind not in operands or rng.randrange(3)):
        return rng.choice(known[kind][-9:])
    return rng.choice(operands[kind])
