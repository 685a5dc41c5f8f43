"""The GPU's kernels for samples that are too large for a thread: one program works on a block."""

import math

import pytest
import torch
from gpu_chains import (
    BODIES,
    DEVICE,
    NEWTON,
    Recurrence,
    attention,
    chain_of,
    check,
    check_stats,
    coupled,
    in_turn,
    net,
    normal,
    normed,
)
from torch import Tensor

import pcr_fx
from pcr_fx.targets import TritonKernel

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("gpu_kernels")
POINTWISE_AND_NORMS = [name for name in BODIES if name != "attention"]


def states(*shape: int) -> Tensor:
    return normal(*shape, dtype=torch.float64)


@pytest.mark.parametrize("solver", ["newton", "sequential"])
@pytest.mark.parametrize("name, width, length, samples", in_turn(POINTWISE_AND_NORMS, [(6, 4, 2), (12, 2, 1)]))
def test_a_chain_agrees_with_the_model(name: str, width: int, length: int, samples: int, solver: str) -> None:
    model = net(BODIES[name], width, length).double()
    transformed = check(model, states(samples, width), {**NEWTON, "solver": solver}, 1e-12)
    assert chain_of(transformed)["solver_forward"] == chain_of(transformed)["solver_backward"] == solver


@pytest.mark.parametrize("solver, length", [("newton", 2), ("sequential", 5)])
def test_intermediates_that_go_through_memory(solver: str, length: int) -> None:
    """Attention reads its scores along other axes than they were computed along."""
    check(net(attention, 6, length).double(), states(1, 6), {**NEWTON, "solver": solver}, 1e-12)


def test_a_square_whose_derivative_is_written_as_a_first_power() -> None:
    model = net(lambda x, w, b: 0.5 * x + 0.1 * (x @ w + b) ** 2, 6, 2).double()
    check(model, states(1, 6), {**NEWTON, "solver": "newton"}, 1e-12)


@pytest.mark.parametrize("solver, numbers", [("newton", 16), ("newton", 128), ("sequential", 4), ("sequential", 32)])
def test_tiles_in_slices(solver: str, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops over rows, and within them over columns, that leave a rest each."""
    from pcr_fx.targets.triton.tiles import source as tile_source

    monkeypatch.setattr(tile_source, "TILE_BYTES", 8 * numbers)
    width = 5 if solver == "newton" else 11
    check(net(normed, width, 2).double(), states(1, width), {**NEWTON, "solver": solver}, 1e-12)


@pytest.mark.parametrize("solver", ["newton", "sequential"])
def test_operands_that_are_too_many_to_be_held(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pcr_fx.targets.triton.tiles import tiling

    monkeypatch.setattr(tiling, "_HELD", 0)
    check(net(coupled, 9, 3).double(), states(1, 9), {**NEWTON, "solver": solver}, 1e-12)


@pytest.mark.parametrize("width, samples", [(6, 3), (17, 1), (33, 1)])
def test_float32(width: int, samples: int) -> None:
    check(net(coupled, width, 2), normal(samples, width), NEWTON, 2e-5)


@pytest.mark.parametrize("length", [2, 3, 4, 5, 9, 10])
def test_chunks_with_a_rest(length: int) -> None:
    """Backward there is a column more than forward."""
    check(net(coupled, 5, length).double(), states(1, 5), NEWTON, 1e-12)


@pytest.mark.parametrize("solver", ["newton", "sequential"])
def test_shared_weights_and_operands_of_each_sample(solver: str) -> None:
    """More blocks than one program adds up gradients of, and more samples than that."""
    torch.manual_seed(0)
    samples = 17 if solver == "sequential" else 1
    inputs = torch.randn(9, samples, 3, dtype=torch.float64)
    check(Recurrence(5).double().to(DEVICE), inputs.to(DEVICE), {**NEWTON, "solver": solver}, 1e-12)


def test_no_samples() -> None:
    check(net(coupled, 7, 4), normal(0, 7), NEWTON, 1e-6)


def test_inputs_that_are_not_contiguous() -> None:
    check(net(coupled, 6, 3).double(), states(6, 2).mT, NEWTON, 1e-12)


def chaotic(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Where the first feature starts between 0 and 1; at rest where it starts at 0."""
    return 3.9 * x * (1 - x) + 0 * (x @ w + b)


def test_one_sample_that_newton_does_not_solve() -> None:
    model = net(chaotic, 5, 24).double()
    x = torch.zeros(3, 5, dtype=torch.float64, device=DEVICE)
    x[1] = torch.linspace(0.2, 0.7, 5)
    transformed = pcr_fx.transform(model, (x,), options={"solver": "newton", "min_length": 2})
    in_sequence = pcr_fx.transform(model, (x,), options={"solver": "sequential", "min_length": 2})
    assert torch.equal(transformed(x), in_sequence(x))
    assert chain_of(transformed)["fallbacks"] == 1


def test_iterations_and_residual_are_those_of_the_solver_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    check_stats(net(coupled, 6, 12).double(), states(1, 6), monkeypatch)


def test_gradients_of_a_growing_adjoint() -> None:
    """A product of many expanding Jacobians is not accurate: what is not is computed block by block."""
    model = net(lambda x, w, b: 1.5 * x + torch.sin(x) @ w, 5, 24).double()
    check(model, states(1, 5), {"solver": "newton"}, 1e-9)


def test_the_reduction_agrees_with_that_in_pytorch() -> None:
    """The kernels of the linear system by themselves, in poisoned memory."""
    from pcr_fx.linear import solve_recurrence
    from pcr_fx.targets.triton.tiles import reduction

    samples, columns, d = 2, 7, 18
    jacobians = states(samples, columns, d, d) / math.sqrt(d)
    residuals = states(samples, columns, d)
    expected = solve_recurrence(jacobians.transpose(0, 1), residuals.transpose(0, 1), "sequential")
    jacobians[:, 0] = math.nan
    chunk = reduction.chunk_of(columns)
    chunks = -(-columns // chunk)
    maps = torch.full((samples, chunks - 1, d, d + 1), math.nan, dtype=torch.float64, device=DEVICE)
    stats = torch.full((samples, 3), -1.0, dtype=torch.float64, device=DEVICE)
    for transposed, width in ((False, 32), (True, 32), (False, 8), (True, 8)):
        matrices = jacobians.mT.contiguous() if transposed else jacobians
        got = torch.zeros_like(expected)
        square = {"D": d, "PADDED": 32, "TRANSPOSED": transposed}
        reduction.compose[(samples * (chunks - 1) * 2,)](
            matrices, residuals, maps, stats, columns, chunk, chunks, **square, SLICE=reduction.SLICE
        )
        reduction.apply[(samples * chunks,)](
            matrices, residuals, maps, got, stats, columns, samples, chunk, chunks, **square, WIDTH=width
        )
        torch.testing.assert_close(got.flip(0) if transposed else got, expected)


def test_more_numbers_than_kernels_are_made_for_are_declined() -> None:
    model, x = net(coupled, 130, 9), normal(1, 130)
    transformed = pcr_fx.transform(model, (x,))
    assert "fused kernels take 1 to 128" in " ".join(str(transformed.report).split())


def test_memory_is_counted_with_jacobians() -> None:
    transformed = pcr_fx.transform(net(coupled, 8, 20), (normal(3, 8),), options=NEWTON)
    (item,) = (one.plan for one in transformed.report.chains)
    assert isinstance(item.kernel, TritonKernel)
    assert 3 * 21 * 8 * 8 * 4 < item.kernel.scratch_bytes(3, 32) < 2 * 3 * 21 * 8 * 8 * 4
    assert item.kernel.scratch_bytes(3) == 3 * 21 * 8 * 4


def test_where_jacobians_do_not_fit_it_goes_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from pcr_fx.planner import rule
    from pcr_fx.ways import case

    monkeypatch.setattr(case, "BYTES_UNASKED", 10)
    monkeypatch.setattr(rule, "GPU_NEWTON_LENGTH", 2)
    model, x = net(coupled, 6, 9).double(), states(2, 6)
    for limit, expected in ((5_000, "sequential"), (10_000, "newton")):
        transformed = check(model, x, {"planning": "estimated", "min_length": 2, "memory_limit": limit}, 1e-12)
        assert chain_of(transformed)["solver_backward"] == expected
        assert "fused kernels" in str(transformed.report)


def test_auto_goes_by_jacobian_entries() -> None:
    for width, expected in ((64, "newton"), (65, "sequential")):
        model, x = net(coupled, width, 128), normal(1, width)
        chain = chain_of(pcr_fx.transform(model, (x,), options={"planning": "estimated"}))
        assert (chain["solver_forward"], chain["solver_backward"]) == ("sequential", expected)
