"""Launches of native code are prepared once, and no call gets what was prepared for another."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import pcr_fx
from pcr_fx.planner import plan
from pcr_fx.registry import Registry
from pcr_fx.targets import CppKernel

LENGTH, WIDTH = 9, 3
NATIVE = {"solver": "sequential"}
IN_OPS = {"solver": "sequential", "kernels": False}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.outer(torch.tanh(self.inner(x)))


class Loop(nn.Module):
    """A cell that all blocks share."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(LENGTH):
            x = x + 0.1 * self.outer(torch.tanh(self.inner(x)))
        return x


def residual_net() -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(LENGTH)))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def given(batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, WIDTH, dtype=dtype)


def results(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """The output, and the gradients of the input and of all parameters."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(None if p.grad is None else p.grad.clone() for p in model.parameters())]


def assert_same(fast: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, tolerance: float = 1e-11) -> None:
    for ours, theirs in zip(results(fast, model, x), results(model, model, x), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=tolerance, atol=tolerance)


def node_of(fast: Any) -> Any:
    return next(m for m in fast._pcr_variants[0].run.modules() if isinstance(m, pcr_fx.node.SolveNode))


def variants() -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """The same numbers as tensors that lie or are made otherwise."""
    yield "contiguous", lambda x: x
    yield "transposed", lambda x: x.t().contiguous().t()
    yield "strided", lambda x: x.repeat_interleave(2, 1)[:, ::2]
    yield "shifted", lambda x: torch.cat([x.new_ones(5), x.flatten()])[5:].view(x.shape)
    yield "negative view", lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag
    yield "broadcast", lambda x: x[:1].expand(x.shape)
    yield "a parameter", lambda x: nn.Parameter(x.clone())
    yield "the other dtype", lambda x: x


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("make", [residual_net, Loop])
def test_one_after_another_of_all_kinds(make: Callable[[], nn.Module], batch: int) -> None:
    model = make().double()
    fast = pcr_fx.transform(model, given(), NATIVE)
    for _ in range(2):
        for _, changed in variants():
            assert_same(fast, model, changed(given(batch)))
        assert_same(fast, model, given(batch + 1))


def test_another_dtype_and_back() -> None:
    model = residual_net().double()
    fast = pcr_fx.transform(model, given(), NATIVE)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4), (torch.float64, 1e-11)):
        model.to(dtype)
        assert_same(fast, model, given(dtype=dtype), tolerance)


@pytest.mark.parametrize("pack", [False, True])
def test_parameters_elsewhere_in_memory(pack: bool) -> None:
    model = residual_net().double()
    fast: Any = pcr_fx.transform(model, given(), NATIVE, pack_parameters=pack)
    x = given()
    fast(x).sum().backward()
    with torch.no_grad():
        for parameter in fast.parameters():  # other memory, laid out otherwise
            parameter.data = (2 * parameter).movedim(0, -1).contiguous().movedim(-1, 0)
    model = copy.deepcopy(model) if pack else model
    if pack:
        for parameter in model.parameters():
            parameter.data.mul_(2)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-11, atol=1e-11)


def test_one_tensor_in_two_places() -> None:
    def step(z: Tensor, operands: tuple[Tensor, Tensor], shared: Any) -> Tensor:
        return 0.5 * torch.tanh(z + operands[0] * operands[1])

    stack = torch.randn(LENGTH, 2, WIDTH, dtype=torch.float64, requires_grad=True)
    for operands in ((stack, stack), (stack, stack.detach()), (stack.detach(), stack)):
        x = given().requires_grad_()
        z: Any = pcr_fx.solve_chain(step, x, operands, options=NATIVE).trajectory
        ours = torch.autograd.grad(z[-1].square().sum(), [x, stack])
        state = x
        for a, b in zip(*operands, strict=True):
            state = step(state, (a, b), ())
        theirs = torch.autograd.grad(state.square().sum(), [x, stack])
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", [NATIVE, IN_OPS, {"solver": "newton", "kernels": False}])
@pytest.mark.parametrize("make", [residual_net, Loop])
def test_frozen_parameters_get_no_gradient(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    model = make().double()
    fast = pcr_fx.transform(model, given(), options)
    for frozen in ((), ("inner",), ("weight",), ("bias", "outer"), ("weight", "bias"), ()):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(word in name for word in frozen))
        assert_same(fast, model, given())


def test_some_blocks_frozen() -> None:
    model = residual_net().double()
    fast = pcr_fx.transform(model, given(), NATIVE)
    for block in list(model)[2:5]:
        block.requires_grad_(False)
    assert_same(fast, model, given())


@pytest.mark.parametrize("make", [residual_net, Loop])
def test_native_code_is_told_what_is_wanted(make: Callable[[], nn.Module]) -> None:
    model = make().double()
    fast = pcr_fx.transform(model, given(), NATIVE)
    results(fast, model, given())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("weight" not in name)
    with mock.patch.object(CppKernel, "solve_adjoint", autospec=True, side_effect=CppKernel.solve_adjoint) as told:
        results(fast, model, given())
    (_, _, _, _, _, _, wanted), _ = told.call_args
    assert sorted(wanted) == [False, False, True, True]
    kernel = node_of(fast)._straight.popitem()[1][1].way.kernel
    assert kernel._body_for(wanted).pullback.operations < kernel.lowered.pullback.operations


def test_programs_in_ops_compute_only_what_is_wanted() -> None:
    model = residual_net().double()
    fast = pcr_fx.transform(model, given(), IN_OPS)
    fast(given())
    program = node_of(fast).outcome.program
    kept = program.wanting((False, True, False, False))
    tensors = [torch.randn(2, WIDTH), *(torch.randn(p.shape) for p in model[0].parameters()), torch.randn(2, WIDTH)]
    tensors = [tensor.double() for tensor in tensors]
    every, some = program.step_pullback(*tensors), kept.step_pullback(*tensors)
    torch.testing.assert_close(list(some), [every[0], every[2]])
    assert len(kept.step_pullback._graph.graph.nodes) < len(program.step_pullback.__self__.graph.nodes)


def test_transforms_and_modes_take_no_launch_for_plain_calls() -> None:
    model = residual_net().double()
    fast: Any = pcr_fx.transform(model, given(), NATIVE)
    x = given()
    plain = results(fast, model, x)
    jacobian = torch.func.jacrev(fast)(x)
    torch.testing.assert_close(jacobian, torch.func.jacrev(model)(x), rtol=1e-10, atol=1e-10)
    many = torch.randn(4, 2, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(fast)(many), torch.vmap(model)(many), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(results(fast, model, x), plain, rtol=0, atol=0)


def test_what_a_transform_has_left_behind() -> None:
    model = residual_net().double()
    fast = pcr_fx.transform(model, given(), NATIVE)
    left: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        left.append(x)
        return x.sum()

    x = given()
    torch.func.grad(keep)(x)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(fast(left[0]), model(x), rtol=1e-11, atol=1e-11)


def test_many_threads_at_once() -> None:
    model = residual_net().double()
    fast = pcr_fx.transform(model, given(), NATIVE)
    inputs = [given(batch) for batch in (1, 2, 3, 4)]
    expected = [model(x) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(50):
            x = inputs[index].clone().requires_grad_()
            y = fast(x)
            (gradient,) = torch.autograd.grad(y.sum(), x)
            if not torch.allclose(y, expected[index], rtol=1e-10) or not gradient.isfinite().all():
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index % 4,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("threads", [1, 2])
def test_another_number_of_threads(threads: int) -> None:
    model, before = residual_net().double(), torch.get_num_threads()
    fast = pcr_fx.transform(model, given(), NATIVE)
    assert_same(fast, model, given(40))
    torch.set_num_threads(threads)
    try:
        assert_same(fast, model, given(40))
    finally:
        torch.set_num_threads(before)


def test_as_many_launches_as_are_kept() -> None:
    model = residual_net().double()
    fast = pcr_fx.transform(model, given(), NATIVE)
    results(fast, model, given())
    kernel = node_of(fast)._straight.popitem()[1][1].way.kernel
    most = len(kernel._launches)  # of a kernel that all models like this one have
    with mock.patch("pcr_fx.targets.cpp.kernel._LAUNCHES", most):
        for batch in (11, 12, 13, 14, 11, 12):
            assert_same(fast, model, given(batch))
    assert len(kernel._launches) <= most


def test_a_copy_keeps_a_record_of_its_own() -> None:
    model = residual_net().double()
    fast: Any = pcr_fx.transform(model, given(), NATIVE)
    fast(given())
    node = node_of(fast)
    twin, calls = copy.deepcopy(node), node.record.forward_calls
    operands = [
        torch.stack([dict(b.named_parameters())[n].detach() for b in model]) for n, _ in model[0].named_parameters()
    ]
    twin([given()], operands, [])
    assert node.record.forward_calls == calls and twin.record.forward_calls == 1


def test_a_node_with_a_record_of_its_own_tells_of_its_own_calls() -> None:
    def step(z: Tensor, operand: Tensor, shared: Any) -> Tensor:
        return 0.5 * torch.tanh(z + operand)

    stack = torch.randn(LENGTH, 2, WIDTH, dtype=torch.float64)
    first, second = (pcr_fx.solve_chain(step, given(), stack, options=NATIVE) for _ in range(2))
    assert first.stats.outcome.success and second.stats.outcome.success


@pytest.mark.usefixtures("kernel_cache")
@pytest.mark.parametrize("way_in", ["transform", "compile"])
def test_planning_compiles_the_code_that_training_calls(way_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An input of each step, of which nobody wants a gradient: what is timed is what is called, and nothing else is compiled."""
    built: list[Any] = []
    original = CppKernel._built

    def counting(kernel: CppKernel, direction: str, *others: Any) -> Any:
        built.append((direction, others[-1]))
        return original(kernel, direction, *others)

    monkeypatch.setattr(CppKernel, "_built", counting)
    monkeypatch.setattr(plan, "_plans", Registry())

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(WIDTH, WIDTH, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros_like(x[:, 0])
            for index in range(x.shape[1]):
                h = self.cell(x[:, index], h)
            return h

    model, x = Cell(), torch.randn(2, 20, WIDTH, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = {
        "transform": lambda: pcr_fx.transform(model, x),
        "compile": lambda: torch.compile(model, backend="deeppcr"),
    }
    fast = compiled[way_in]()
    expected = torch.autograd.grad(model(x).square().sum(), model.cell.parameters())
    for _ in range(2):
        found = torch.autograd.grad(fast(x).square().sum(), model.cell.parameters())
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert [wanted for direction, wanted in built if direction == "adjoint"] == [(False, True, True, True, True)]


@pytest.mark.parametrize("with_outputs", [False, True])
@pytest.mark.parametrize("width", [1, 3])
def test_cotangents_whose_memory_holds_negatives(width: int, with_outputs: bool) -> None:
    """Such as autograd makes of the imaginary part of a conjugate."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weights = torch.randn(LENGTH, width, width, dtype=torch.float64) / width
            self.weights = nn.ParameterList(map(nn.Parameter, weights))

        def forward(self, x: Tensor) -> Tensor:
            outputs = []
            for weight in self.weights:
                x = x + torch.tanh(x @ weight)
                outputs.append(torch.sin(x))
            return torch.stack(outputs) if with_outputs else x

    model, x = Net(), torch.randn(1, width, dtype=torch.float64)
    fast, weights = pcr_fx.transform(model, x, NATIVE), torch.randn(1, width, dtype=torch.complex128)
    y = fast(x)
    negative = torch._neg_view(torch.randn_like(y))  # type: ignore[attr-defined]
    for got, true in zip(
        torch.autograd.grad(y, list(fast.parameters()), negative, retain_graph=True),
        torch.autograd.grad(model(x), list(model.parameters()), negative),
        strict=True,
    ):
        torch.testing.assert_close(got, true)

    def loss(y: Tensor) -> Tensor:
        return (torch.complex(torch.zeros_like(y), y).conj() * weights).real.sum()

    for got, true in zip(
        torch.autograd.grad(loss(y), list(fast.parameters())),
        torch.autograd.grad(loss(model(x)), list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(got, true)
