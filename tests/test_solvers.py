"""The family of iterative solvers: linearisations, windows, starts, hopeless chains; against float64 block by block."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import relative_error
from torch import Tensor, nn

import pcr_fx
from pcr_fx import Outcome, SolveError, solve_chain
from pcr_fx.body import Signature, build_program
from pcr_fx.chain import Chain, TensorSpec
from pcr_fx.linear import solve_recurrence
from pcr_fx.solvers import linearisation
from pcr_fx.stopping import PATIENCE

ITERATIVE = ("newton", "quasi-newton", "picard", "jacobi")
IN_OPS = {"kernels": False, "on_failure": "raise"}


def near_identity(z: Tensor, operands: tuple[Tensor, ...], _: Any) -> Tensor:
    weight, bias = operands
    return z + 0.01 * torch.tanh(z @ weight.T + bias)


def contractive(z: Tensor, operands: tuple[Tensor, ...], _: Any) -> Tensor:
    weight, bias = operands
    return 0.3 * torch.tanh(z @ weight.T + bias)


def kinked(z: Tensor, operands: tuple[Tensor, ...], _: Any) -> Tensor:
    weight, bias = operands
    return 0.4 * torch.relu(z @ weight.T / 2 + bias)


def chaotic(z: Tensor, operands: tuple[Tensor, ...], _: Any) -> Tensor:
    weight, bias = operands
    return 4 * torch.sin(3 * z @ weight.T + bias)


# A chain that each solver does well on.
SUITED = {"newton": contractive, "quasi-newton": contractive, "picard": near_identity, "jacobi": contractive}


def problem(
    length: int, batch: int = 3, d: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, tuple[Tensor, ...]]:
    torch.manual_seed(length)
    weight, bias = torch.randn(length, d, d, dtype=dtype) / d**0.5, torch.randn(length, d, dtype=dtype)
    return torch.randn(batch, d, dtype=dtype), (weight, bias)


def in_sequence(step: Callable[..., Tensor], x0: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
    states = [x0]
    for block in zip(*operands, strict=True):
        states.append(step(states[-1], block, ()))
    return torch.stack(states[1:])


def check(step: Callable[..., Tensor], x0: Tensor, operands: tuple[Tensor, ...], **options: Any) -> pcr_fx.SolveStats:
    """Values and every gradient against block by block; the solve's stats."""
    leaves = [tensor.requires_grad_() for tensor in (x0, *operands)]
    solution = solve_chain(step, x0, operands, options={**IN_OPS, **options})
    expected = in_sequence(step, x0, operands)
    weights = torch.linspace(-1, 2, expected.numel(), dtype=expected.dtype).view_as(expected)
    tolerance = 1e-10 if x0.dtype == torch.float64 else 2e-5
    assert relative_error(solution.trajectory.detach(), expected.detach()) < tolerance
    got = torch.autograd.grad((solution.trajectory * weights).sum(), leaves)
    for ours, theirs in zip(got, torch.autograd.grad((expected * weights).sum(), leaves), strict=True):
        assert relative_error(ours, theirs) < tolerance
    return solution.stats


@pytest.mark.parametrize("solver", ITERATIVE)
@pytest.mark.parametrize("length", [1, 2, 3, 17, 64, 65])
@pytest.mark.parametrize("step", [near_identity, contractive, kinked])
def test_every_solver_has_the_same_solution_and_exact_gradients(
    step: Callable[..., Tensor], length: int, solver: str
) -> None:
    # Each is as good as its stand-in for the Jacobians: 0 is far from that of a block near the identity, and the
    # identity from that of one that forgets.
    if length > 10 and (solver, step is near_identity) in {("jacobi", True), ("picard", False)}:
        pytest.skip("needs about as many iterations as there are blocks, and is given up")
    stats = check(step, *problem(length), solver=solver)
    assert stats.outcome.success and stats.fallback is None


@pytest.mark.parametrize("solver", ITERATIVE)
def test_float32(solver: str) -> None:
    check(SUITED[solver], *problem(40, dtype=torch.float32), solver=solver)


@pytest.mark.parametrize("solver", ["newton", "quasi-newton", "picard"])
@pytest.mark.parametrize(
    "length, window", [(5, 4), (16, 16), (17, 16), (63, 16), (64, 16), (65, 16), (40, 100), (50, 2)]
)
def test_windows(length: int, window: int, solver: str) -> None:
    check(near_identity, *problem(length), solver=solver, window=window)


def test_a_window_moves_on_where_all_blocks_at_once_get_nowhere() -> None:
    x0, operands = problem(200, batch=1)
    whole = solve_chain(chaotic, x0, operands, options={"solver": "newton", "kernels": False})
    assert whole.stats.fallback is not None
    # As many iterations as it takes: each solves a block at the least.
    options = {**IN_OPS, "solver": "newton", "window": 4, "max_iterations": 4}
    solution = solve_chain(chaotic, x0, operands, options=options)
    assert 50 <= solution.stats.iterations <= 200
    previous = torch.cat([x0[None], solution.trajectory[:-1]])
    made = torch.stack([chaotic(z, block, ()) for z, *block in zip(previous, *operands, strict=True)])
    assert relative_error(solution.trajectory, made) < 1e-14


@pytest.mark.parametrize("solver", ITERATIVE)
def test_damping(solver: str) -> None:
    x0, operands = problem(30)
    full = check(SUITED[solver], x0.detach(), operands, solver=solver)
    damped = check(SUITED[solver], x0.detach(), operands, solver=solver, damping=0.7)
    assert damped.iterations > full.iterations


def test_damping_to_nothing_is_given_up() -> None:
    x0, operands = problem(20)
    options = {"kernels": False, "solver": "newton", "damping": 1e-12}
    stats = solve_chain(near_identity, x0, operands, options=options).stats
    assert stats.fallback is Outcome.STAGNATED and stats.iterations < 640


def test_too_slow_is_not_called_stagnated() -> None:
    """Jacobi's iteration is right after as many iterations as blocks, and is allowed fewer."""
    x0, operands = problem(100)
    options = {"kernels": False, "solver": "jacobi"}
    assert solve_chain(near_identity, x0, operands, options=options).stats.fallback is None
    limited = solve_chain(near_identity, x0, operands, options={**options, "max_iterations": 30}).stats
    assert limited.fallback is Outcome.ITERATION_LIMIT and limited.iterations < 30


def program_of(step: Callable[..., Tensor], x0: Tensor, operands: tuple[Tensor, ...]) -> Any:
    class Body(nn.Module):
        def forward(self, z: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
            return (step(z, (weight, bias), ()),)

    chain = Chain(torch.fx.symbolic_trace(Body()), len(operands[0]), num_operands=2)
    states = (TensorSpec.of(x0),)
    return build_program(chain, Signature(states, tuple(TensorSpec.of(operand[0]) for operand in operands), ()))


def test_the_diagonal_is_that_of_the_jacobian() -> None:
    x0, operands = problem(7, d=5)
    program = program_of(near_identity, x0, operands)
    previous = torch.randn(7, 3, 5, dtype=torch.float64)
    values, jacobians = program.linearise(previous, *operands)
    same_values, diagonal = linearisation("quasi-newton").linearise(program, previous, operands, ())
    torch.testing.assert_close(same_values, values)
    torch.testing.assert_close(diagonal, jacobians.diagonal(dim1=-2, dim2=-1))
    # An estimate from many probes comes near to it, from one it does not; it is the same in every call.
    estimates = [
        linearisation("quasi-newton", probes).linearise(program, previous, operands, ())[1] for probes in (1, 1, 4000)
    ]
    assert torch.equal(estimates[0], estimates[1])
    errors = [float((estimate - diagonal).abs().max()) for estimate in estimates]
    assert errors[2] < 0.2 * errors[0]


@pytest.mark.parametrize("solver", ITERATIVE)
def test_corrections_are_those_of_the_dense_linear_system(solver: str) -> None:
    x0, operands = problem(6, batch=2, d=3)
    program = program_of(near_identity, x0, operands)
    previous = torch.randn(6, 2, 3, dtype=torch.float64)
    residuals = torch.randn(6, 2, 3, dtype=torch.float64)
    jacobians = program.linearise(previous, *operands)[1]
    eye = torch.eye(3, dtype=torch.float64)
    stand_in = {
        "newton": jacobians,
        "quasi-newton": jacobians * eye,
        "picard": eye.expand_as(jacobians),
        "jacobi": torch.zeros_like(jacobians),
    }[solver]
    expected, delta = [], torch.zeros(2, 3, dtype=torch.float64)
    for matrix, residual in zip(stand_in, residuals, strict=True):
        delta = (matrix @ delta.unsqueeze(-1)).squeeze(-1) + residual
        expected.append(delta)
    kind = linearisation(solver)
    matrices = kind.linearise(program, previous, operands, ())[1]
    torch.testing.assert_close(kind.correct(matrices, residuals, "auto"), torch.stack(expected))


def test_probes_only_speed_up_what_is_solved_exactly() -> None:
    check(contractive, *problem(50), solver="quasi-newton", diagonal_probes=2)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("solver", ["newton", "picard"])
def test_starts(solver: str, window: int | None) -> None:
    x0, operands = problem(60)
    options = {"solver": solver, "window": window}
    check(near_identity, x0, operands, **options, start="picard")
    solution = solve_chain(near_identity, x0.detach(), operands, options={**IN_OPS, **options})
    # A start that is the solution is seen to be at once.
    again = solve_chain(near_identity, x0.detach(), operands, options={**IN_OPS, **options}, start=solution.trajectory)
    assert again.stats.iterations <= (0 if window is None else 4)
    assert relative_error(again.trajectory, solution.trajectory) < 1e-14


def test_a_start_of_another_form_is_refused() -> None:
    x0, operands = problem(9)
    with pytest.raises(pcr_fx.UnsupportedError, match=r"start must be a trajectory with the shapes \[\(9, 3, 3\)\]"):
        solve_chain(near_identity, x0, operands, start=torch.zeros(8, 3, 3))


class Net(nn.Module):
    def __init__(self, length: int, width: int, scale: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(length)])
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.scale * torch.tanh(layer(x))
        return x


def chain_of(model: Any) -> dict[str, Any]:
    (chain,) = model.report.to_dict()["chains"]
    return chain


def test_the_previous_trajectory_is_kept_by_each_node() -> None:
    torch.manual_seed(0)
    model = Net(40, 3).double()
    fast = pcr_fx.transform(model, options={**IN_OPS, "solver": "newton", "start": "previous"})
    x, other = torch.randn(4, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(fast(x), model(x))
    first = chain_of(fast)["iterations"]
    torch.testing.assert_close(fast(x), model(x))
    assert chain_of(fast)["iterations"] == 0 < first
    # Another batch size, and a copy, start anew.
    torch.testing.assert_close(fast(other), model(other))
    assert chain_of(fast)["iterations"] > 0
    twin = copy.deepcopy(fast)
    torch.testing.assert_close(twin(other), model(other))
    assert chain_of(twin)["iterations"] > 0
    torch.testing.assert_close(fast(other), model(other))
    assert chain_of(fast)["iterations"] == 0


class Growing(Net):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = 4 * torch.sin(3 * layer(x))
        return x


def growing() -> Growing:
    torch.manual_seed(0)
    model = Growing(300, 4)
    for layer in model.layers:
        nn.init.normal_(layer.weight, std=2.0)
    return model


@pytest.mark.parametrize("solver", ITERATIVE)
def test_a_hopeless_chain_is_given_up_after_a_few_iterations(solver: str) -> None:
    model, x = growing(), torch.randn(2, 4)
    fast = pcr_fx.transform(model, options={"solver": solver, "kernels": False})
    torch.testing.assert_close(fast(x), model(x))
    chain = chain_of(fast)
    assert chain["fallbacks"] == 1 and chain["iterations"] <= 2 * PATIENCE
    with pytest.raises(SolveError, match=f"{'Newton' if solver == 'newton' else solver} did not solve"):
        pcr_fx.transform(model, options={"solver": solver, **IN_OPS})(x)


def test_a_hopeless_chain_is_not_tried_again_at_once() -> None:
    model, x = growing(), torch.randn(2, 4)
    fast = pcr_fx.transform(model, options={"solver": "newton", "kernels": False})
    tried = []
    for _ in range(50):
        fast(x)
        tried.append(chain_of(fast)["fallbacks"])
    # At the first call, 16 calls later, 32 calls after that.
    assert [call for call in range(50) if tried[call] > (tried[call - 1] if call else 0)] == [0, 16, 48]
    text = str(pcr_fx.report(fast))
    assert "3 in 50 calls" in text and "tried again in 63 calls" in " ".join(text.split())


def test_corrections_that_overflow_end_a_solve() -> None:
    x0, operands = problem(2000, batch=1)
    solution = solve_chain(chaotic, x0, operands, options={"solver": "newton", "kernels": False})
    assert solution.stats.fallback is Outcome.NON_FINITE
    assert solution.stats.iterations <= 5


@pytest.mark.parametrize("limit", [20_000, 2**30])
def test_memory_decides_the_window(limit: int) -> None:
    model = Net(400, 4).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    fast = pcr_fx.transform(model, options={"solver": "newton", "kernels": False, "memory_limit": limit})
    got, expected = fast(x), model(x)
    torch.testing.assert_close(got, expected)
    theirs = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    for ours, other in zip(torch.autograd.grad(got.square().sum(), list(fast.parameters())), theirs, strict=True):
        torch.testing.assert_close(ours, other)
    chain = chain_of(fast)
    assert chain["extra_memory_bytes"] <= limit
    assert (chain["window"] is None) == (limit > 2**20)
    if chain["window"]:
        assert chain["iterations"] > 400 / chain["window"]
        assert f"{chain['window']} of 400 blocks at a time" in str(pcr_fx.report(fast))
        fits = f"forward in windows of {chain['window']}, which fit into the memory limit of 19.53 KiB"
        assert fits in chain["reason"] and "backward in windows of" in chain["reason"]


def test_no_window_is_small_enough_for_no_memory() -> None:
    model, x = Net(40, 4), torch.randn(3, 4)
    fast = pcr_fx.transform(model, options={"solver": "newton", "kernels": False, "memory_limit": 0})
    torch.testing.assert_close(fast(x), model(x))
    assert chain_of(fast)["solver_forward"] == chain_of(fast)["solver_backward"] == "sequential"
    assert "a window of 8 blocks would not fit into the memory limit, 0 B" in chain_of(fast)["reason"]


@pytest.mark.parametrize("length", [1, 2, 5, 33])
def test_a_diagonal_system_is_solved_as_one_of_matrices(length: int) -> None:
    diagonal = torch.randn(length, 2, 3, dtype=torch.float64)
    residuals = torch.randn(length, 2, 3, dtype=torch.float64)
    got = linearisation("quasi-newton").correct(diagonal, residuals, "auto")
    torch.testing.assert_close(got, solve_recurrence(torch.diag_embed(diagonal), residuals))
