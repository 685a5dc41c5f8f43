"""A chain to measure: solved by a solve node, and block by block by eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from benchmarks.gpu.timing import median_us, replayed
from benchmarks.models import residual_block
from pcr_fx.chain import Chain
from pcr_fx.node import SolveNode
from pcr_fx.ops import operators_for, waits
from pcr_fx.options import Options
from pcr_fx.planner import Plan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def layer(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    """A layer of a plain MLP, as in the paper."""
    return (torch.tanh(F.linear(x, weight, bias)),)


@dataclass(frozen=True, eq=False)
class Problem:
    """`block(x, *operands) -> (x,)`, its operands `[L, ...]`, and where the chain starts, `[B, d]`."""

    block: Callable[..., tuple[Tensor]]
    operands: list[Tensor]
    x: Tensor

    @property
    def length(self) -> int:
        return len(self.operands[0])

    @cached_property
    def exact(self) -> Problem:
        """The same in float64."""
        return replace(self, operands=[operand.double() for operand in self.operands], x=self.x.double())

    def eager_forward(self) -> Callable[[], list[Tensor]]:
        """The blocks one after another: no modules are called, which is faster than a model of modules."""
        blocks = list(zip(*(operand.unbind(0) for operand in self.operands), strict=True))

        def run() -> list[Tensor]:
            x = self.x
            with torch.no_grad():
                for operands in blocks:
                    (x,) = self.block(x, *operands)
            return [x]

        return run

    def eager_backward(self) -> Callable[[], list[Tensor]]:
        """The gradients of the start and of each block's own operands, given a forward; stacked afterwards."""
        x = self.x.detach().requires_grad_()
        columns = [[part.clone().requires_grad_() for part in operand.unbind(0)] for operand in self.operands]
        out = x
        for operands in zip(*columns, strict=True):
            (out,) = self.block(out, *operands)
        inputs, ones = [x, *(part for column in columns for part in column)], torch.ones_like(out)
        return lambda: list(torch.autograd.grad(out, inputs, ones, retain_graph=True))

    def stacked(self, gradients: list[Tensor]) -> list[Tensor]:
        """The gradients of `eager_backward` as `Solved.backward` returns them."""
        d_x, *rest = gradients
        length = self.length
        return [d_x, *(torch.stack(rest[i : i + length]) for i in range(0, len(rest), length))]

    @cached_property
    def exact_forward(self) -> list[Tensor]:
        return self.exact.eager_forward()()

    @cached_property
    def exact_backward(self) -> list[Tensor]:
        return self.exact.stacked(self.exact.eager_backward()())


class Solved:
    """A problem solved by a solve node."""

    def __init__(self, problem: Problem, solver: str) -> None:
        self.problem = problem
        chain = Chain(fx.symbolic_trace(problem.block), problem.length, num_operands=len(problem.operands))
        self.node = SolveNode(chain, Options(solver=solver))
        plan = self.node.plan_for([problem.x], problem.operands, [])
        if not isinstance(plan, Plan):
            raise plan
        self.plan = plan
        self.initial = plan.program.layout.flatten([problem.x])
        if solver == "auto":  # chosen as for a training step, but not against eager, which takes seconds
            call = plan.program.call_with(self.initial, problem.operands, [])
            plan.measure(call, needs_gradient=True, with_eager=False)

    def forward(self) -> list[Tensor]:
        with torch.no_grad():
            return [self.node([self.problem.x], self.problem.operands, [])[0][-1]]

    def backward(self) -> Callable[[], list[Tensor]]:
        """The adjoint and all gradients, given a trajectory."""
        solve, adjoint = operators_for(self.plan)
        name = self.plan.key, self.node.record.id
        trajectory = solve(self.initial, self.problem.operands, [], *name)
        cotangents = torch.zeros_like(trajectory)
        cotangents[-1] = 1
        return lambda: adjoint(self.initial, trajectory, self.problem.operands, [], cotangents, *name, [])

    def iterations(self) -> int | None:
        """Newton's iterations in the latest forwards."""
        last = self.node.record.last
        return last.iterations if last is not None else None

    def replay(self, function: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        return function if waits(self.plan) else replayed(function)

    def described(self, direction: str) -> str:
        choice = self.plan.choice(self.plan.samples(self.initial))
        way = choice.forward if direction == "forward" else choice.backward
        return f"{way.solver}, {way.kind or 'in torch ops'}"


def residual(length: int, width: int, samples: int, seed: int = 0) -> Problem:
    """The chain of `benchmarks.models`, with the weights that `nn.Linear` starts with."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    bound = width**-0.5

    def uniform(*shape: int) -> Tensor:
        return torch.empty(shape, device=DEVICE).uniform_(-bound, bound, generator=generator)

    shapes = [(length, width, width), (length, width)] * 2
    return Problem(residual_block, [uniform(*shape) for shape in shapes], _start(samples, width, generator))


def plain(length: int, width: int, samples: int = 1, seed: int = 0) -> Problem:
    """The plain MLP of `examples/mlp_depth.py`: orthogonal weights, so that signals neither explode nor die out."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    weights = torch.linalg.qr(torch.randn(length, width, width, device=DEVICE, generator=generator))[0]
    biases = 0.1 * torch.randn(length, width, device=DEVICE, generator=generator)
    return Problem(layer, [weights.contiguous(), biases], _start(samples, width, generator))


def _start(samples: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(samples, width, device=DEVICE, generator=generator)


def error(got: list[Tensor], exact: list[Tensor]) -> float:
    """The largest error of any tensor, relative to its largest number."""
    pairs = zip(got, exact, strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


@dataclass(frozen=True)
class Measured:
    """One way to compute something: its time, its error against float64, Newton's iterations."""

    name: str
    us: float
    error: float | None
    iterations: int | None = None


def solved(problem: Problem, solver: str, direction: str, with_error: bool = True) -> Measured:
    """Ours, replayed from a CUDA graph."""
    ours = Solved(problem, solver)
    run = ours.replay(ours.forward if direction == "forward" else ours.backward())
    us, got, off = median_us(run), run(), None
    if with_error:
        off = error(got, problem.exact_forward if direction == "forward" else problem.exact_backward)
    return Measured(ours.described(direction), us, off, ours.iterations() if direction == "forward" else None)


def eager(problem: Problem, direction: str, graph: bool = False) -> Measured:
    """Eager PyTorch, called from Python or replayed from a CUDA graph."""
    run = problem.eager_forward() if direction == "forward" else problem.eager_backward()
    run = replayed(run) if graph else run
    us, got = median_us(run), run()
    if direction == "forward":
        return Measured("eager in a CUDA graph" if graph else "eager", us, error(got, problem.exact_forward))
    return Measured("eager backward", us, error(problem.stacked(got), problem.exact_backward))
