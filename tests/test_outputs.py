"""What blocks give away beside their states: outputs of any shape and dtype, by every way, with all derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pcr_fx
from pcr_fx.node import SolveNode

LENGTH = 12
SEQUENTIAL = {"solver": "sequential"}
Step = Callable[[Any, Tensor, Tensor], tuple[Tensor, Any]]


class Loop(nn.Module):
    """`step(module, h, x) -> (h, what is collected)`, for each of the inputs."""

    def __init__(self, step: Step, hand_over: Callable[[list[Any]], Any] | None = None) -> None:
        super().__init__()
        self.step = step
        self.hand_over = hand_over or (lambda collected: torch.stack(collected, 1))
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.float64) / 2)
        self.rate = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.out = nn.Linear(3, 2).double()

    def forward(self, h: Tensor, xs: Tensor) -> Any:
        collected = []
        for t in range(xs.shape[0]):
            h, given = self.step(self, h, xs[t])
            collected.append(given)
        return self.hand_over(collected), h


def flux(m: Any, h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    q = m.rate * torch.relu(h - 0.1)
    return h + 0.1 * x - q, q


def gate(m: Any, h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    gates = x @ m.weight + h @ m.weight
    h = torch.sigmoid(gates) * h + torch.tanh(x)
    return h, torch.tanh(gates * h)


def readout(m: Any, h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    """Only the new state is read."""
    h = torch.tanh(h @ m.weight + x)
    return h, F.softmax(m.out(h), -1)


def scalar(m: Any, h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    """A number a sample, and one of all samples."""
    error = x - h @ m.weight
    return torch.tanh(h + m.rate * error), error.square().sum(-1) + error.mean()


def spike(m: Any, h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    """With a surrogate gradient."""
    over = h - 0.5
    soft = torch.sigmoid(4 * over)
    fired = (over > 0).to(h.dtype) + soft - soft.detach()
    return 0.9 * h + x @ m.weight - fired * 0.5, fired


def carried_reads(m: Any, h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    """What the block before returned, and what only the operand decides."""
    new = torch.tanh(h @ m.weight + x.sin())
    return new, (new - h) * x.sin() * 2


def truth(m: Any, h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    new = torch.tanh(h @ m.weight + x)
    return new, new > h


def index(m: Any, h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    new = torch.tanh(h @ m.weight + x)
    return new, new.argmax(-1)


def narrower(m: Any, h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    new = torch.tanh(h @ m.weight + x)
    return new, (new * m.rate).float()


STEPS: dict[str, Step] = {
    step.__name__: step for step in (flux, gate, readout, scalar, spike, carried_reads, truth, index, narrower)
}


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 3, dtype=torch.float64), torch.randn(LENGTH, 4, 3, dtype=torch.float64)


def results(run: Callable[..., Any], model: nn.Module, given: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [*(x.clone().requires_grad_() for x in given), *model.parameters()]
    flat: list[Tensor] = torch.utils._pytree.tree_leaves(run(*leaves[: len(given)]))
    total = sum(
        (one.double() * torch.linspace(-1, 1, one.numel(), dtype=torch.float64).view(one.shape)).sum()
        for one in flat
        if one.requires_grad
    )
    return [*flat, *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)]  # type: ignore[arg-type]


def check(model: nn.Module, options: dict[str, Any], given: tuple[Tensor, ...] | None = None, chains: int = 1) -> Any:
    given = inputs() if given is None else given
    fast = pcr_fx.transform(model, given, options)
    tolerance = 1e-12 if "newton" not in str(options) else 1e-10
    for ours, theirs in zip(results(fast, model, given), results(model, model, given), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(fast(*given), model(*given), rtol=tolerance, atol=tolerance)
    assert len(fast.report.chains) == chains, fast.report
    return fast


def node_of(fast: Any) -> SolveNode:
    return next(m for m in fast._pcr_variants[0].run.modules() if isinstance(m, SolveNode))


WAYS = {
    "kernel": SEQUENTIAL,
    "ops": {"solver": "sequential", "kernels": False},
    "newton": {"solver": "newton", "kernels": False},
    "left alone": {"solver": "auto", "kernels": False, "planning": "estimated"},
}


@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name in STEPS for way in WAYS if way != "kernel" or name in ("flux", "truth")]
)
def test_outputs(name: str, way: str) -> None:
    fast = check(Loop(STEPS[name]), WAYS[way])
    node = node_of(fast)
    assert node.chain.length >= LENGTH - 1
    assert node.chain.head is not None and node.chain.head.num_outputs >= 1
    assert len(node.leaving.taps) <= 2  # all but the last state is handed over whole


@pytest.mark.parametrize("solver", ["quasi-newton", "picard"])
def test_outputs_by_other_solvers(solver: str) -> None:
    model = Loop(flux)
    fast = check(model, {"solver": solver, "kernels": False, "tolerance": 1e-15, "max_iterations": 200})
    assert node_of(fast).chain.head is not None


def test_only_what_states_need_is_in_the_chain() -> None:
    """The body of the solve has no op, no operand and no parameter that only outputs read."""
    chain = node_of(check(Loop(readout), SEQUENTIAL)).chain
    assert chain.num_shared == 1
    assert [n.name for n in chain.body.graph.nodes if "softmax" in n.name or "linear" in n.name] == []
    assert chain.head is not None and not chain.head.reads_old_states(1)


HANDED_OVER: dict[str, Callable[[list[Any]], Any]] = {
    "stacked": torch.stack,
    "stacked last": lambda collected: torch.stack(collected, -1),
    "reversed": lambda collected: torch.stack(collected[::-1], 1),
    "joined": lambda collected: torch.cat(collected, 1),
    "a part": lambda collected: torch.stack(collected[3:9]),
    "every other": lambda collected: torch.stack(collected[::2]),
    "the first alone": lambda collected: collected[0] * 1,
    "the last alone": lambda collected: collected[-1] * 1,
    "a list": list,
}


@pytest.mark.parametrize("name", HANDED_OVER)
def test_however_they_are_handed_over(name: str) -> None:
    check(Loop(flux, HANDED_OVER[name]), {"solver": "sequential", "kernels": False})


def test_several_outputs_and_states_at_once() -> None:
    def step(m: Any, h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
        new, q = flux(m, h, x)
        return new, (q, new, q > 0.2, m.out(new))

    def hand_over(collected: list[Any]) -> Any:
        return [torch.stack(one) for one in zip(*collected, strict=True)]

    node = node_of(check(Loop(step, hand_over), SEQUENTIAL))
    assert len(node.leaving.whole) == 4


@pytest.mark.parametrize("way", ["kernel", "ops", "newton"])
def test_outputs_that_are_something_else_by_another_name(way: str) -> None:
    def step(m: Any, h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
        new = torch.tanh(h @ m.weight + x)
        q = new * m.rate
        return new, (new.type(h.dtype), h.to(h.dtype), x.type(h.dtype), q, q.double(), new[:, 1:], new.view(4, 3))

    def hand_over(collected: list[Any]) -> Any:
        return [torch.stack(one) for one in zip(*collected, strict=True)]

    fast = check(Loop(step, hand_over), WAYS[way])
    assert len(node_of(fast).leaving.whole) >= 5


def test_outputs_may_be_written_to() -> None:
    def step(m: Any, h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
        new = torch.tanh(h @ m.weight + x)
        return new, new.type(h.dtype)

    class Writing(Loop):
        def forward(self, h: Tensor, xs: Tensor) -> Any:
            said, h = super().forward(h, xs)
            said.mul_(0)
            return said, h

    check(Writing(step), {"solver": "sequential", "kernels": False})


def test_results_written_into() -> None:
    class Written(Loop):
        def forward(self, h: Tensor, xs: Tensor) -> Any:
            flows = torch.zeros(4, LENGTH, 3, dtype=h.dtype)
            levels, wet = torch.empty(LENGTH, 4, 3, dtype=h.dtype), torch.zeros(LENGTH, 4, 3, dtype=torch.bool)
            for t in range(LENGTH):
                h, flows[:, t] = flux(self, h, xs[t])
                levels[t] = h
                wet[t] = h > 0
            return flows, levels, wet

    node = node_of(check(Written(flux), SEQUENTIAL))
    assert len(node.leaving.whole) == 3


@pytest.mark.parametrize("length", [1, 7, 8, 9, 33])
def test_lengths(length: int) -> None:
    given = inputs()[0], torch.randn(length, 4, 3, dtype=torch.float64)
    check(Loop(gate), {"solver": "sequential", "kernels": False}, given, chains=int(length >= 8))


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_other_batch_sizes_later(batch: int) -> None:
    model, given = Loop(gate), (torch.randn(batch, 3).double(), torch.randn(LENGTH, batch, 3).double())
    fast = pcr_fx.transform(model, inputs(), {"solver": "sequential", "kernels": False})
    for ours, theirs in zip(results(fast, model, given), results(model, model, given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_second_derivatives() -> None:
    model, (h, xs) = Loop(gate), inputs()
    fast = pcr_fx.transform(model, (h, xs), SEQUENTIAL)

    def seconds(run: Any) -> Tensor:
        leaf = h.clone().requires_grad_()
        (first,) = torch.autograd.grad(run(leaf, xs)[0].square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [leaf, model.weight])

    torch.testing.assert_close(seconds(fast), seconds(model), rtol=1e-11, atol=1e-11)


def test_vmap_and_function_transforms() -> None:
    model, (h, xs) = Loop(gate), inputs()
    fast = pcr_fx.transform(model, (h, xs), {"solver": "sequential", "kernels": False})
    several = torch.stack([h, 2 * h])
    mapped = [torch.vmap(lambda one, run=run: run(one, xs)[0])(several) for run in (fast, model)]
    torch.testing.assert_close(*mapped, rtol=1e-12, atol=1e-12)
    gradients = [torch.func.grad(lambda one, run=run: run(one, xs)[0].sin().sum())(h) for run in (fast, model)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    each = [
        torch.vmap(torch.func.grad(lambda one, run=run: run(one, xs)[0].sin().sum()))(several) for run in (fast, model)
    ]
    torch.testing.assert_close(*each, rtol=1e-12, atol=1e-12)


def test_an_output_that_nobody_differentiates_costs_no_adjoint(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (h, xs) = Loop(gate), inputs()
    fast = pcr_fx.transform(model, (h, xs), {"solver": "sequential", "kernels": False})
    outputs, state = fast(h.requires_grad_(), xs)
    (program,) = node_of(fast)._outputs.programs.values()
    monkeypatch.setattr("pcr_fx.body.outputs.OutputProgram.moving", property(lambda self: 1 / 0))
    state.sum().backward()
    assert program is not None and outputs.requires_grad


def test_a_later_block_that_waits_for_an_output_is_still_right() -> None:
    """What is computed of an output on the way decides what a later block is given."""

    class Feedback(Loop):
        def forward(self, h: Tensor, xs: Tensor) -> Any:
            outputs = []
            for t in range(LENGTH):
                h, q = flux(self, h, xs[t])
                if t == LENGTH // 2:
                    h = h * q.mean()
                outputs.append(q)
            return torch.stack(outputs), h

    model, given = Feedback(flux), inputs()
    fast = pcr_fx.transform(model, given, {"solver": "sequential", "kernels": False, "min_length": 3})
    for ours, theirs in zip(results(fast, model, given), results(model, model, given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_autocast_and_low_precision() -> None:
    model = Loop(readout).float()
    given = tuple(x.float() for x in inputs())
    fast = pcr_fx.transform(model, given, {"solver": "sequential", "kernels": False})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = fast(*given)[0], model(*given)[0]
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=5e-2, atol=5e-2)


def test_torch_compile() -> None:
    model, given = Loop(flux), inputs()
    torch._dynamo.reset()
    fast = torch.compile(
        model, backend="deeppcr", options={"inner_backend": "aot_eager", "solver": "newton", "kernels": False}
    )
    for ours, theirs in zip(results(fast, model, given), results(model, model, given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert pcr_fx.report().chains[0].chain.head is not None
