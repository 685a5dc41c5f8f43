"""Programs of all blocks are used only where they compute what single blocks do, by the model's own ops."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from node_cases import CASES, Case, D
from torch import Tensor, nn

import pcr_fx
from pcr_fx.body import Program, Signature, build_program
from pcr_fx.chain import TensorSpec
from pcr_fx.solvers import adjoint_transposed, solve_sequential
from pcr_fx.ways import Iterative

PROGRAMS = ("evaluate", "linearise", "pullback")


def program_of(case: Case, length: int = 6, batch: int = 2) -> Program:
    inputs = case.inputs(length, batch)
    groups = inputs.states, [operand[0] for operand in inputs.operands], inputs.shared
    return build_program(case.node(length).chain, Signature(*(tuple(map(TensorSpec.of, group)) for group in groups)))


@pytest.mark.parametrize("name", CASES)
def test_programs_that_are_right_have_no_fault(name: str) -> None:
    program = program_of(CASES[name])
    assert [program.fault(each) for each in PROGRAMS] == ["", "", ""]


def slightly(results: Any) -> Any:
    """As wrong as what is to be found may be."""
    return tuple(part * 1.01 for part in results) if isinstance(results, tuple | list) else results * 1.01


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_is_wrong_is_found_out(name: str) -> None:
    right = program_of(CASES["operands and shared"])
    run = getattr(right, name)
    wrong = replace(right, **{name: lambda *tensors: slightly(run(*tensors))}, _faults={})
    assert "differ by 0.01" in wrong.fault(name)
    assert wrong.fault(*PROGRAMS) == wrong.fault(name)


def test_a_program_that_raises_or_has_another_shape_is_not_used() -> None:
    def raises(*_: Tensor) -> Tensor:
        raise RuntimeError("no such size\nand more")

    right = program_of(CASES["operands and shared"])
    wrong = replace(right, evaluate=raises, linearise=lambda *given: (given[0], given[0]), _faults={})
    assert wrong.fault("evaluate") == "its blocks cannot be batched: RuntimeError: no such size"
    assert wrong.fault("linearise")


def test_memory_that_runs_out_is_no_fault_for_good() -> None:
    program = program_of(CASES["operands and shared"])
    on_a_cpu = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    refusals = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(on_a_cpu)]

    def evaluate(*tensors: Tensor) -> Tensor:
        if refusals:
            raise refusals.pop()
        return program.evaluate(*tensors)

    crowded = replace(program, evaluate=evaluate, _faults={})
    assert "no memory" in crowded.fault("evaluate")
    assert "no memory" in crowded.fault("evaluate")
    assert not crowded.fault("evaluate")


def test_a_long_chain_is_looked_at_in_a_shorter_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcr_fx.body.agreement._NUMBERS", 4 * 3 * D * D)
    program = program_of(CASES["operands and shared"], length=40)
    assert program.fault(*PROGRAMS) == ""
    assert set(program._shorter) <= {2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12} and program._shorter


class Deep(nn.Module):
    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step = step

    def forward(self, z: Tensor) -> Tensor:
        for _ in range(8):
            z = 0.6 * z + 0.3 * torch.sin(self.step(z))
        return z


def scattered(dim: int) -> Callable[[Tensor], Tensor]:
    return lambda z: torch.select_scatter(z, 0.5 * z.select(dim, 0), dim, z.shape[dim] - 1)


@pytest.mark.parametrize("solver", ["newton", "quasi-newton", "picard", "jacobi"])
@pytest.mark.parametrize("dim", [-1, 0])
def test_ops_that_pytorch_batches_wrongly(dim: int, solver: str) -> None:
    z = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    model = Deep(scattered(dim))
    fast = pcr_fx.transform(model, z, options={"solver": solver})
    expected, got = (torch.autograd.grad(run(z).sum(), z)[0] for run in (model, fast))
    torch.testing.assert_close(got, expected)
    assert "batched" in str(fast.report)


@pytest.mark.parametrize("options", [{"solver": "newton"}, {"kernels": False}, {"planning": "estimated"}, {}], ids=str)
def test_a_program_that_is_invalid_at_other_sizes(options: dict[str, Any]) -> None:
    slope = torch.tensor([0.2])
    model = Deep(lambda z: F.prelu(z, slope))
    fast = pcr_fx.transform(model, torch.randn(3, 4), options={**options, "plan_cache": False})
    for batch in (3, 5):
        x = torch.randn(batch, 4).requires_grad_()
        expected, got = (torch.autograd.grad(run(x).sum(), x)[0] for run in (model, fast))
        torch.testing.assert_close(got, expected)


def test_an_adjoint_is_confirmed_by_the_pullback_of_one_block() -> None:
    """Jacobians and the pullback of all blocks that are wrong alike agree with each other."""
    case = CASES["operands and shared"]
    program, inputs = program_of(case), case.inputs(6, 2)
    groups = [[tensor.detach() for tensor in group] for group in (inputs.states, inputs.operands, inputs.shared)]
    call = program.call_with(program.layout.flatten(groups[0]), groups[1], groups[2])
    trajectory = solve_sequential(program, call)
    cotangents = torch.ones_like(trajectory)
    linearise, pullback = program.linearise, program.pullback

    def linearised(*given: Tensor) -> tuple[Tensor, Tensor]:
        values, jacobians = linearise(*given)
        return values, 0.9 * jacobians

    wrong = replace(
        program, linearise=linearised, pullback=lambda *given: (0.9 * pullback(*given)[0], *pullback(*given)[1:])
    )
    assert adjoint_transposed(program, call, trajectory, cotangents, "auto")[1]
    assert not adjoint_transposed(wrong, call, trajectory, cotangents, "auto")[1]


def test_a_candidate_that_raises_is_a_timing_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any, **__: Any) -> Any:
        raise IndexError("out of range")

    monkeypatch.setattr(Iterative, "bounds", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(Iterative, "hopeless", lambda *_: "")
    monkeypatch.setattr(Iterative, "solve", raises)
    fast = pcr_fx.transform(Deep(torch.tanh), torch.randn(3, 4), options={"kernels": False, "plan_cache": False})
    x = torch.randn(3, 4)
    torch.testing.assert_close(fast(x), fast(x))
    assert "it raised IndexError: out of range" in str(fast.report)
