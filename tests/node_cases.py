"""Bodies for a solve node, and the same blocks one after another to compare it with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import Tensor, fx

import pcr_fx
from pcr_fx import Options
from pcr_fx.chain import Chain
from pcr_fx.node import SolveNode

D = 3
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A body, and the shapes that it takes: `B` in the shape of a state stands for the batch size."""

    body: Callable[..., tuple[Tensor, ...]]
    states: tuple[tuple[Any, ...], ...] = (("B", D),)
    operands: tuple[Shape, ...] = ()
    shared: tuple[Shape, ...] = ()
    literals: int = 0

    def node(self, length: int, **options: Any) -> SolveNode:
        numbers = tuple(tuple(0.1 + (i + j) % 7 / 10 for i in range(length)) for j in range(self.literals))
        counts = len(self.states), len(self.operands), len(self.shared)
        return SolveNode(
            Chain(fx.symbolic_trace(self.body), length, *counts, literals=numbers),
            # In PyTorch's ops; test_kernels.py and test_native_newton.py have native code.
            Options.of({"solver": "newton", "kernels": False, **options}),
        )

    def inputs(self, length: int, batch: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> "Inputs":
        generator = torch.Generator().manual_seed(seed + 100 * length + batch)

        def draw(shape: Sequence[Any], scale: float) -> Tensor:
            values = torch.randn([batch if n == "B" else n for n in shape], generator=generator, dtype=torch.float64)
            return (values * scale).to(dtype).requires_grad_()

        return Inputs(
            [draw(shape, 1.0) for shape in self.states],
            [draw((length, *shape), 0.4) for shape in self.operands],
            [draw(shape, 0.4) for shape in self.shared],
        )


@dataclass(frozen=True)
class Inputs:
    states: list[Tensor]
    operands: list[Tensor]
    shared: list[Tensor]

    @property
    def every(self) -> list[Tensor]:
        return [*self.states, *self.operands, *self.shared]

    def like(self, tensors: Sequence[Tensor]) -> "Inputs":
        first, second = len(self.states), len(self.states) + len(self.operands)
        return Inputs(list(tensors[:first]), list(tensors[first:second]), list(tensors[second:]))

    def to(self, dtype: torch.dtype) -> "Inputs":
        return self.like([tensor.detach().to(dtype).requires_grad_() for tensor in self.every])


def solve(node: SolveNode, inputs: Inputs) -> tuple[Tensor, ...]:
    """The trajectories by `node`, which must have solved them as a chain."""
    result = node(inputs.states, inputs.operands, inputs.shared)
    assert isinstance(node.outcome, pcr_fx.planner.Plan), node.outcome
    return result  # type: ignore[return-value]


def reference(node: SolveNode, inputs: Inputs) -> tuple[Tensor, ...]:
    """The trajectories block by block, in whatever dtype and context."""
    states, trajectory = inputs.states, []
    for index in range(node.chain.length):
        numbers = [values[index] for values in node.chain.literals]
        states = node.chain.body(*states, *(t[index] for t in inputs.operands), *numbers, *inputs.shared)
        trajectory.append(states)
    return tuple(torch.stack(part) for part in zip(*trajectory, strict=True))


def gradients(trajectories: Sequence[Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    """Of a fixed weighting of all states, in all inputs."""
    weighted = [(t * torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in trajectories]
    return torch.autograd.grad(sum(weighted), inputs.every)  # type: ignore[arg-type]


def check(node: SolveNode, inputs: Inputs) -> None:
    """Values and gradients agree with the blocks one after another."""
    got, expected = solve(node, inputs), reference(node, inputs)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)
    for a, b in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
        assert_close(a, b)


def lstm_like(h: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    i, f, o, g = (h @ w).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


TANH = Case(lambda z, w: (torch.tanh(z @ w),), operands=((D, D),))
CASES = {
    "operand": TANH,
    "operands and shared": Case(
        lambda z, w, b, v: (z + 0.3 * torch.tanh(z @ w + b) @ v,), operands=((D, D), (D,)), shared=((D, D),)
    ),
    "shared only": Case(lambda z, v: (torch.tanh(z @ v),), shared=((D, D),)),
    "literals": Case(lambda z, w, a, b: (torch.tanh(z @ w) * a + b,), operands=((D, D),), literals=2),
    "literals only": Case(lambda z, a: (torch.sin(z + a),), literals=1),
    "nothing": Case(lambda z: (torch.cos(z),)),
    "two states": Case(lstm_like, states=(("B", D), ("B", D)), operands=((D, 4 * D),)),
    "states of other widths": Case(
        lambda x, y, w: (torch.tanh(x @ w), 0.5 * y + x.sum(-1, keepdim=True)),
        states=(("B", D), ("B", 2)),
        operands=((D, D),),
    ),
    "batch last": Case(lambda z, w: (torch.tanh(w @ z),), states=((D, "B"),), operands=((D, D),)),
    "layer norm": Case(
        lambda z, w, g, b: (z + F.linear(F.layer_norm(z, (D,), g, b), w),), operands=((D, D), (D,), (D,))
    ),
    "group norm": Case(lambda z, g, b: (z + 0.3 * F.group_norm(z, 1, g, b),), operands=((D,), (D,))),
    "two batch dimensions": Case(
        lambda z, w, g: (z + 0.3 * F.layer_norm(z @ w, (D,), g),), states=(("B", 2, D),), operands=((D, D), (D,))
    ),
    "one op, many names": Case(
        lambda z, a, b, s: (z + a + b + s,), operands=((D,), (D,)), shared=((D,),)
    ),  # every cotangent is the same tensor
}
