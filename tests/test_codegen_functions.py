"""Every row of the table of scalar functions: its twin in PyTorch against what folds it, C++, and Triton."""

import functools
import math
from typing import Any

import pytest
import torch
from compiled_functions import LANES, call_compiled
from torch import Tensor

from pcr_fx.codegen.functions import FUNCTIONS, REDUCTIONS, ScalarFunction
from pcr_fx.codegen.ir import Apply, Buffer, Function, Load, Loop, View

pytestmark = pytest.mark.usefixtures("kernel_cache")

DTYPES = [torch.float64, torch.float32]
EDGES = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-15, -1e-15, 1e15, -1e15]
PLAIN = [1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, 0.3, -0.7, 11.0, -23.0, 0.9]


def arguments(dtype: torch.dtype) -> list[Tensor]:
    """Three arguments for all functions, as many of each as fill any vector: every pair of numbers, and another."""
    numbers = torch.tensor([*EDGES, *PLAIN], dtype=dtype)
    first, second = torch.cartesian_prod(numbers, numbers).unbind(1)
    first, second = (torch.cat([one, one.new_ones(-len(one) % 64)]) for one in (first, second))
    return [first.contiguous(), second.contiguous(), second.roll(7)]


def expected(function: ScalarFunction, given: list[Tensor]) -> Tensor:
    """In float64, so that it is right to the last digit in float32."""
    return function.evaluate(*(argument.double() for argument in given[: function.arity])).to(given[0].dtype)


def assert_agrees(function: ScalarFunction, got: Tensor, given: list[Tensor]) -> None:
    """Up to some roundings, and exactly what is not finite, or zero."""
    true = expected(function, given)
    finite = true.isfinite()
    close = (got - true).abs() <= 8 * torch.finfo(true.dtype).eps * true.abs() + torch.finfo(true.dtype).tiny
    wrong = ~torch.where(finite, close, (got == true) | (got.isnan() & true.isnan()))
    if function.name not in ("maximum", "minimum"):  # of zeros PyTorch's vectors take one, and its numbers the other
        wrong |= (true == 0) & (got == 0) & (got.signbit() != true.signbit())
    if wrong.any():
        at = int(wrong.nonzero()[0])
        numbers = [float(argument[at]) for argument in given[: function.arity]]
        pytest.fail(f"{function.name}{tuple(numbers)} is {float(true[at])}, and not {float(got[at])}")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_row_is_complete(name: str) -> None:
    function = FUNCTIONS[name]
    assert function.name == name
    holes = [f"{{{position}}}" for position in range(3)]
    for spelling in (function.cpp, function.triton):
        assert [hole in spelling for hole in holes] == [position < function.arity for position in range(3)]


@pytest.mark.parametrize("name", [name for name, function in FUNCTIONS.items() if function.fold is not None])
def test_folds(name: str) -> None:
    function, given = FUNCTIONS[name], arguments(torch.float64)
    assert function.fold is not None
    numbers = zip(*(argument.tolist() for argument in given[: function.arity]), strict=True)
    assert_agrees(function, torch.tensor([function.fold(*row) for row in numbers], dtype=torch.float64), given)


# --- C++ ----------------------------------------------------------------------------------------------------------------


def every_function() -> Function:
    """One number of each function of the table, of three numbers."""
    inputs = tuple(Buffer(f"in{index}", 1, True) for index in range(3))
    outputs = tuple(Buffer(f"{name}_", 1, True) for name in FUNCTIONS)
    loads = [Load(View(buffer, ())) for buffer in inputs]
    loops = [
        Loop(View(out, ()), (), Apply(function.name, tuple(loads[: function.arity])))
        for out, function in zip(outputs, FUNCTIONS.values(), strict=True)
    ]
    return Function(inputs, outputs, tuple(loops))


@functools.cache
def of_cpp(dtype: torch.dtype, lanes: str) -> dict[str, Tensor]:
    """What C++ computes of `arguments`, by function, with vectors or without."""
    results = call_compiled(every_function(), [argument.unsqueeze(1) for argument in arguments(dtype)], lanes)
    return {name: result.squeeze(1) for name, result in zip(FUNCTIONS, results, strict=True)}


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_cpp(name: str, dtype: torch.dtype, lanes: str) -> None:
    assert_agrees(FUNCTIONS[name], of_cpp(dtype, lanes)[name], arguments(dtype))


# --- Triton -------------------------------------------------------------------------------------------------------------


@functools.cache
def of_triton(dtype: torch.dtype) -> dict[str, Tensor]:
    """What Triton computes of `arguments`, by function: on a GPU if there is one, else in its interpreter."""
    from pcr_fx.targets.triton.build import load_module
    from pcr_fx.targets.triton.printer import HEADER, REALS, print_assignments
    from pcr_fx.targets.triton.scalars.unroll import Assignment

    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = [argument.to(device) for argument in arguments(dtype)]
    size = 1 << (len(given[0]) - 1).bit_length()
    lines = [f"in{index} = tl.load(inputs + {index} * numbers + place, mask=live)" for index in range(3)]
    for row, function in enumerate(FUNCTIONS.values()):
        names = tuple(f"in{index}" for index in range(function.arity))
        lines += print_assignments([Assignment("value", function.name, names)], REALS[dtype])
        lines.append(f"tl.store(results + {row} * numbers + place, value, mask=live)")
    head = ["@triton.jit", "def apply_all(inputs, results, numbers, BLOCK: tl.constexpr):"]
    body = ["place = tl.arange(0, BLOCK)", "live = place < numbers", *lines]
    module: Any = load_module(HEADER + "\n".join([*head, *(f"    {line}" for line in body)]) + "\n")
    results = given[0].new_empty(len(FUNCTIONS), len(given[0]))
    module.apply_all[(1,)](torch.stack(given), results, len(given[0]), BLOCK=size)
    return dict(zip(FUNCTIONS, results.cpu(), strict=True))


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter computes by NumPy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_triton(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    assert_agrees(FUNCTIONS[name], of_triton(dtype)[name], arguments(dtype))


# --- reductions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_reduction_is_its_function_of_all_numbers(name: str) -> None:
    reduction = REDUCTIONS[name]
    numbers = torch.tensor([[2.0, -1.0, 0.5], [4.0, math.nan, 3.0]], dtype=torch.float64)
    assert reduction.function is FUNCTIONS[name]
    one_by_one = functools.reduce(
        reduction.function.evaluate, numbers.unbind(1), torch.full((2,), reduction.start).double()
    )
    torch.testing.assert_close(reduction.twin(numbers, (1,)), one_by_one, equal_nan=True)
