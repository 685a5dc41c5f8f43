"""Linear recurrences against a float64 loop."""

import pytest
import torch
from comparison import relative_error

from pcr_fx.linear import LINEAR_SOLVERS, sequential_depth, solve_recurrence, solve_transposed
from pcr_fx.linear.algebra import EntriesFirst, MatricesLast, choose_algebra

LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 31, 33, 1023, 1024, 1025]


def loop(matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    states = [offsets[0]]
    for matrix, offset in zip(matrices[1:], offsets[1:], strict=True):
        states.append((matrix @ states[-1].unsqueeze(-1)).squeeze(-1) + offset)
    return torch.stack(states)


def transposed_loop(matrices: torch.Tensor, cotangents: torch.Tensor) -> torch.Tensor:
    adjoints = [cotangents[-1]]
    for index in range(len(matrices) - 2, -1, -1):
        adjoints.insert(0, (matrices[index + 1].mT @ adjoints[0].unsqueeze(-1)).squeeze(-1) + cotangents[index])
    return torch.stack(adjoints)


def system(length: int, batch: tuple[int, ...], d: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length * 100 + d)
    matrices = torch.randn(length, *batch, d, d, dtype=torch.float64, generator=generator) * 0.7 / d**0.5
    return matrices, torch.randn(length, *batch, d, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("method", LINEAR_SOLVERS)
@pytest.mark.parametrize("d", [1, 3, 8, 9])
@pytest.mark.parametrize("length", LENGTHS)
def test_against_the_loop(length: int, d: int, method: str) -> None:
    for batch in ((), (1,), (3, 2), (20,)):
        matrices, offsets = system(length, batch, d)
        expected, adjoint = loop(matrices, offsets), transposed_loop(matrices, offsets)
        # The first matrix belongs to x_0 = 0 and may be anything.
        matrices[0] = float("nan")
        assert relative_error(solve_recurrence(matrices, offsets, method), expected) < 1e-12
        assert relative_error(solve_transposed(matrices, offsets, method), adjoint) < 1e-12
        single = solve_recurrence(matrices.float(), offsets.float(), method)
        assert relative_error(single.double(), expected) < 1e-4


@pytest.mark.parametrize("algebra", [EntriesFirst(), MatricesLast()])
def test_layouts_agree(algebra) -> None:
    matrices, offsets = system(17, (3,), 4)
    packed = algebra.pack_matrices(matrices), algebra.pack_vectors(offsets)
    solved = LINEAR_SOLVERS["cyclic_reduction"](algebra, *packed)
    assert relative_error(algebra.unpack_vectors(solved, offsets.shape), loop(matrices, offsets)) < 1e-12


def test_the_layout_follows_size_and_number() -> None:
    assert isinstance(choose_algebra(torch.empty(1024, 32, 4)), EntriesFirst)
    assert isinstance(choose_algebra(torch.empty(1024, 1, 4)), MatricesLast)
    assert isinstance(choose_algebra(torch.empty(1024, 32, 16)), MatricesLast)


def test_inputs_need_not_be_contiguous_and_are_not_written() -> None:
    matrices, offsets = system(33, (5,), 3)
    strided = matrices.mT.contiguous().mT, offsets.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    before = [tensor.clone() for tensor in strided]
    assert relative_error(solve_recurrence(*strided), loop(matrices, offsets)) < 1e-12
    assert all(torch.equal(a, b) for a, b in zip(strided, before, strict=True))


def test_nothing_to_solve() -> None:
    assert solve_recurrence(torch.empty(4, 0, 3, 3), torch.empty(4, 0, 3)).shape == (4, 0, 3)


@pytest.mark.parametrize(
    ("method", "depth"), [("cyclic_reduction", 20), ("parallel_cyclic_reduction", 10), ("sequential", 1024)]
)
def test_depth(method: str, depth: int) -> None:
    assert sequential_depth(1024, method) == depth
