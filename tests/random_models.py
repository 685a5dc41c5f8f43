"""Random straight-line models for the property tests: chains with things changed in them, and random words of ops.

A model is a list of lines of Python, so that a failing one can be printed, cut down and run by itself.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 4

# What one op of a block may be. `{0}` is a value of the block; the others are named by what they take.
UNARY = [
    "torch.tanh({0})",
    "{0}.sin()",
    "1.0 - {0}",
    "{0} * 0.5",
    "F.gelu(input={0})",
    "{0}.flip(1)",
    "{0}.roll(1, 1)",
    "{0} - {0}.max(1, keepdim=True)[0]",
    "{0} - torch.var_mean({0}, 1, keepdim=True)[1]",
    "torch.cat({0}.chunk(2, 1)[::-1], 1)",
    "torch.cat([{0}[:, 1:], {0}[:, :1]], dim=1)",
    "torch.stack({0}.unbind(1)[::-1], 1)",
    "torch.where({0} > 0, {0}, 0.1 * {0})",
    "{0} / (1 + {0}.abs())",
    "{0}.softmax(-1)",
    "F.layer_norm({0}, (4,))",
    "{0}.t().tanh().t()",
    "{0}.reshape(-1).cos().view_as({0})",
    "{0} + 0.1 * {0}.detach()",
    "F.relu({0} * 0.9, inplace=True)",
    "{0}.clone().mul_(0.7)",
]
BINARY = [
    "{0} + {1}",
    "{0} - {1}",
    "{0} * {1}",
    "torch.maximum({0}, {1})",
    "torch.lerp({0}, {1}, 0.3)",
    "torch.add({0}, {1}, alpha=0.5)",
    "torch.sub({0}, other={1})",
    "torch.where({0} > 0, {1}, {0})",
]
MATRIX = ["{0} @ {1}", "F.linear({0}, {1})", "torch.tanh({0}.matmul({1}.t()))", "torch.addmm({0}, {0}, {1})"]
NUMBER = [
    "{0} * {1}",
    "{1} - {0}",
    "{0} / (3.0 + {1})",
    "{0} + ({0} > 0) * {1}",
    "torch.add({0}, {1})",
    "{0} ** 2 * {1}",
]
ORDER = ["{0}[:, {1}]", "{0}.index_select(1, {1})"]
# Ops that forbid a rewrite, or may.
IMPURE = [
    "F.dropout({0}, 0.3, True)",
    "{0} + 0.1 * torch.randn_like({0})",
    "{0} + torch.rand({0}.shape[0], 4, dtype=torch.float64)",
    "{0}.mul_(0.9)",
    "self.norm({0})",
    "{0} + self.counter.add_(0.1)",
]
# Operands; `{t}` is the block. Those of the first kind are matrices, then rows, then what is the same in all blocks.
MATRICES = ["self.weights[{t}]", "self.frozen[{t}]", "self.layers[{t}].weight", "self.shared"]
ROWS = ["self.gains[{t}]", "x[:, {t}]", "xs[{t}]", "self.alpha[{t}]", "self.alpha[{t}] * xs[{t}]", "self.steps[{t}]"]
ROWS += ["self.offset", "x[:, 0]", "(self.gains[{t}] * 0.5).sin()", "x[:, {t}].relu()"]
NUMBERS = ["0.{t}5", "{t}", "-0.3", "2"]
ORDERS = ["self.order[{t}]", "self.order[0]"]
# Lines put somewhere into a model: `{v}` and `{u}` are values known there, `{n}` is a new name.
WRITES = [
    "{v}.mul_(0.5)",
    "{v} += {u}",
    "{v}[:, 0] = 0.3",
    "{v}[0].zero_()",
    "{v}.t().add_(0.1)",
    "{v}.copy_({u})",
    "F.relu({v}, inplace=True)",
    "torch.tanh_({v})",
    "torch.add({v}, {u}, out={v})",
    "torch.mul({v}, 0.5, out={n}_out)",
    "{v}.data.mul_(0.5)",
    "{v}.detach().add_(0.2)",
    "{v}[:, 1:].clamp_(-0.1, 0.1)",
    "self.offset.mul_(1.5)",
    "self.alpha[1].add_(0.5)",
    "self.alpha += 0.1",
    "self.frozen[2].data.t().mul_(0.5)",
    "x[:, 2].mul_(0.5)",
    "x.mul_(0.5)",
]
CHANGES = [
    "{v} = {v}.detach()",
    "{v} = {v}.float().double()",
    "{v} = {v}[:1]",
    "{v} = {v}.mean(0)",
    "{v} = {v}.t()",
    "{v} = {v}.clone()",
    "{v} = {u}",
    "{v} = {v} + {u}",
    "{v} = F.dropout({v}, 0.3, True)",
    "{v} = {v} + torch.randn_like({v})",
    "{n} = torch.rand(4, dtype=torch.float64)\n{v} = {v} * {n}",
    "{v} = self.norm({v})",
    "with torch.no_grad(): {v} = {v} * 2",
]
ALIASES = ["{v}.view(-1)", "{v}.t()", "{v}[:, 1:]", "{v}.detach()", "{v}[0]", "{v}.chunk(2, 1)[1]", "{v}.reshape(-1)"]
STARTS = ["x[:, 0]", "x.mean(1)", "torch.zeros(x.shape[0], 4, dtype=x.dtype)", "self.start.expand(x.shape[0], 4)"]


@dataclass
class Line:
    """`result = template(args)`; without a result, a line put in as it is."""

    result: str
    template: str
    args: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = self.template.format(*self.args) if self.result else self.template
        return f"{self.result} = {text}" if self.result else text


@dataclass
class Program:
    """The forward of a model; `values` are the names that the lines before the last give."""

    lines: list[Line]
    outputs: list[str]
    length: int
    seed: int = 0

    def source(self) -> str:
        head = ["def forward(self, x):", "xs = x.unbind(1)"]
        body = "\n".join(map(str, self.lines)).splitlines()
        return "\n    ".join([*head, *body, f"return {', '.join(self.outputs)},"])

    def before(self, place: int) -> list[str]:
        """The values that line `place` may use, the latest last."""
        return list(dict.fromkeys(line.result for line in self.lines[:place] if line.result))


class RandomModel(nn.Module):
    """Parameters and buffers for every block, of which a program uses some. The input is `[batch, time, 4]`."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(WIDTH, WIDTH) / 3 for _ in range(length)])
        self.gains = nn.ParameterList([torch.rand(WIDTH) for _ in range(length)])
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(length)])
        self.frozen = nn.ParameterList(
            [nn.Parameter(torch.randn(WIDTH, WIDTH) / 3, requires_grad=False) for _ in range(length)]
        )
        self.shared, self.start = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3), nn.Parameter(torch.rand(WIDTH))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("offset", torch.rand(WIDTH))
        self.register_buffer("counter", torch.zeros(()))
        self.register_buffer("alpha", torch.rand(length))
        self.register_buffer("steps", torch.arange(length))
        self.register_buffer("order", torch.stack([torch.randperm(WIDTH) for _ in range(length)]))


def build(program: Program) -> tuple[nn.Module, Tensor]:
    """The model in float64, and an input."""
    names = {"torch": torch, "F": F}
    exec(compile(program.source(), "<random model>", "exec"), names)
    torch.manual_seed(program.seed)
    model = type("Random", (RandomModel,), {"forward": names["forward"]})(program.length).double()
    return model, torch.randn(2 + program.seed % 3, program.length, WIDTH, dtype=torch.float64)


# --- chains ----------------------------------------------------------------------------------------------------------


def random_chain(rng: random.Random, min_length: int = 3, impure: bool = False) -> Program:
    """Blocks of one random body over one or two states, each fed by the one before."""
    length, states = rng.randint(min_length, 20), rng.randint(1, 2)
    body = [_random_op(rng, index, states, impure) for index in range(rng.randint(1, 6))]
    # State 0 is what the last op makes; state 1 any value of the block, or the state 0 before.
    second = rng.choice([f"inner {index}" for index in range(len(body))] + ["state 0 1"])
    starts = [rng.choice(STARTS) for _ in range(states)]
    lines = [Line(f"s{state}", start) for state, start in enumerate(starts)]
    history = [[f"s{state}" for state in range(states)]] * 2
    for block in range(length):
        names = {f"inner {index}": f"b{block}_{index}" for index in range(len(body))}
        names |= {f"state {state} {lag}": history[-lag][state] for state in range(states) for lag in (1, 2)}
        for index, (template, args) in enumerate(body):
            args = [names.get(arg) or arg.format(t=block) for arg in args]
            lines.append(Line(names[f"inner {index}"], template, args))
        history.append([names[f"inner {len(body) - 1}"], names[second]][:states])
    taps = [rng.choice(rng.choice(history)) for _ in range(rng.choice([0, 0, 1, 3]))]
    return Program(lines, [*dict.fromkeys(history[-1] + taps)], length, rng.randrange(1000))


def _random_op(rng: random.Random, index: int, states: int, impure: bool) -> tuple[str, list[str]]:
    """A template and what it takes: `inner 2`, `state 1 2` (state 1 of two blocks before), or an operand."""
    known = [f"inner {other}" for other in range(index)]
    known += [f"state {state} {lag}" for state in range(states) for lag in (1, 1, 1, 2)]
    first = known[index - 1] if index else "state 0 1"
    if rng.randrange(4) == 0:
        first = rng.choice(known)
    if impure and rng.randrange(8) == 0:
        return rng.choice(IMPURE), [first]
    templates, operands = rng.choice(
        [(UNARY, []), (BINARY, known), (BINARY, ROWS), (MATRIX, MATRICES), (NUMBER, NUMBERS), (ORDER, ORDERS)]
    )
    return rng.choice(templates), [first, rng.choice(operands)] if operands else [first]


def is_recurrent(program: Program) -> bool:
    """Whether the last state depends on a state of every kind of block: what is no recurrence is no chain."""
    reads: dict[str, set[str]] = {}
    for line in program.lines:
        reads[line.result] = set(line.args).union(*(reads.get(arg, ()) for arg in line.args))
    first = {name for name in reads if name.startswith("b1_")}
    return bool(first & reads[program.outputs[0]])


# --- words -----------------------------------------------------------------------------------------------------------


def random_words(rng: random.Random) -> Program:
    """Words over a small alphabet of ops, repeated with slips: near chains come about by themselves."""
    letters = [rng.choice([*UNARY, *BINARY * 2, *MATRIX, *IMPURE[:4]]) for _ in range(rng.randint(2, 3))]
    lines = [Line("v0", "x[:, 0]"), Line("v1", rng.choice(STARTS)), Line("w0", "self.weights[0] * 1.0")]
    for _ in range(rng.randint(1, 3)):
        word = [
            (rng.choice(letters), rng.choice([1, 1, 1, 2, 3]), rng.choice([1, 2, 2, 3]))
            for _ in range(rng.randint(1, 4))
        ]
        for _ in range(rng.randint(3, 12)):
            for letter, *back in word:
                values = [line.result for line in lines if line.result != "w0"]
                slip = rng.randrange(25) == 0
                args = [rng.choice(values[-4:]) if slip else values[-min(steps, len(values))] for steps in back]
                if letter in MATRIX:
                    args[1] = rng.choice(["self.shared", "w0"]) if slip else "self.shared"
                lines.append(Line(f"v{len(values)}", rng.choice(letters) if rng.randrange(60) == 0 else letter, args))
    names = [line.result for line in lines]
    outputs = dict.fromkeys([names[-1], *(rng.choice(names) for _ in range(rng.choice([0, 1, 4])))])
    return Program(lines, list(outputs), 4, rng.randrange(1000))


# --- changes ---------------------------------------------------------------------------------------------------------


def change(rng: random.Random, program: Program) -> None:
    """Change one thing at a random place."""
    place = rng.randint(3, len(program.lines))
    kind = rng.choice([_other_op, _other_argument, _swap, _other_use, _insert, _insert, _alias, _alias])
    kind(rng, program, min(place, len(program.lines) - 1))


def _recent(rng: random.Random, program: Program, place: int) -> str:
    """A value known before a line: mostly one of the last few."""
    values = program.before(place)
    return rng.choice(values[-5:] if rng.randrange(4) else values)


def _other_op(rng: random.Random, program: Program, place: int) -> None:
    line = program.lines[place]
    groups = [group for group in (UNARY + IMPURE, BINARY, MATRIX, NUMBER, ORDER) if line.template in group]
    if groups:
        line.template = rng.choice(groups[0])


def _other_argument(rng: random.Random, program: Program, place: int) -> None:
    line = program.lines[place]
    if line.args:
        other = rng.choice(["x[:, 1]", "self.offset", "0.25", "self.gains[1]", *[_recent(rng, program, place)] * 4])
        line.args[rng.randrange(len(line.args))] = other


def _swap(rng: random.Random, program: Program, place: int) -> None:
    program.lines[place].args.reverse()


def _other_use(rng: random.Random, program: Program, place: int) -> None:
    """A value read a second time: by the caller, or by a line further on."""
    value = _recent(rng, program, place)
    if rng.randrange(2):
        program.outputs.append(value)
    else:
        later = rng.choice(program.lines[place:])
        later.template, later.args = "{0} + 0.1 * {1}", [(later.args or [value])[0], value]


def _insert(rng: random.Random, program: Program, place: int) -> None:
    value, other, new = _recent(rng, program, place), _recent(rng, program, place), f"n{len(program.lines)}"
    text = rng.choice(WRITES + CHANGES).format(v=value, u=other, n=new)
    if f"{new}_out" in text:
        program.lines.insert(place, Line("", f"{new}_out = torch.empty_like({value})"))
        program.outputs.append(f"{new}_out")
    program.lines.insert(place + (f"{new}_out" in text), Line("", text))


def _alias(rng: random.Random, program: Program, place: int) -> None:
    """Another name for a value, used or written further on."""
    value, new = _recent(rng, program, place), f"n{len(program.lines)}"
    program.lines.insert(place, Line("", f"{new} = {rng.choice(ALIASES).format(v=value)}"))
    later = min(len(program.lines), place + rng.randint(1, 8))
    if rng.randrange(3):
        program.lines.insert(
            later, Line("", f"{new}{rng.choice(['.mul_(0.5)', '.add_(0.1)', '.zero_()', '[0] = 0.2'])}")
        )
    if rng.randrange(2):
        program.outputs.append(new)
