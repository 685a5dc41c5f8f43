"""The solver by itself: theory, outcomes, gradients, bad input."""

import threading
from typing import Any

import pytest
import torch
from comparison import relative_error
from torch import Tensor

import pcr_fx
from pcr_fx import Outcome, solve_chain

# In PyTorch's ops; test_kernels.py and test_native_newton.py have native code.
NEWTON = {"solver": "newton", "kernels": False}


def tanh_step(z: Tensor, operands: dict[str, Tensor], shared: tuple[Tensor, ...]) -> Tensor:
    return z + 0.5 * torch.tanh(z @ operands["weight"].T + operands["bias"]) * shared[0]


def problem(length: int, batch: int = 3, d: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    torch.manual_seed(length)
    operands = {
        "weight": torch.randn(length, d, d, dtype=dtype) / (3 * d**0.5),
        "bias": torch.randn(length, d, dtype=dtype),
    }
    return torch.randn(batch, d, dtype=dtype), operands, (torch.rand(d, dtype=dtype) / 10,)


def sequential(step: Any, x0: Tensor, operands: Any, shared: Any, length: int) -> Tensor:
    states, state = [], x0
    for index in range(length):
        state = step(state, {name: value[index] for name, value in operands.items()}, shared)
        states.append(state)
    return torch.stack(states)


@pytest.mark.parametrize("solver", ["newton", "sequential", "auto"])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 1024])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_states_and_gradients(length: int, batch: int, solver: str) -> None:
    x0, operands, shared = problem(length, batch)
    leaves = [tensor.requires_grad_() for tensor in (x0, *operands.values(), *shared)]
    solution = solve_chain(tanh_step, x0, operands, shared=shared, options={"solver": solver})
    expected = sequential(tanh_step, x0, operands, shared, length)
    weights = torch.randn_like(expected)
    assert relative_error(solution.trajectory, expected) < 1e-9
    got = torch.autograd.grad((solution.trajectory * weights).sum(), leaves)
    for a, b in zip(got, torch.autograd.grad((expected * weights).sum(), leaves), strict=True):
        assert relative_error(a, b) < 1e-9


def test_residual_is_that_of_the_returned_trajectory() -> None:
    x0, operands, shared = problem(100)
    solution = solve_chain(tanh_step, x0, operands, shared=shared, options={**NEWTON, "tolerance": 1e-3})
    previous = torch.cat([x0[None], solution.trajectory[:-1]])
    made = torch.stack([tanh_step(z, {k: v[i] for k, v in operands.items()}, shared) for i, z in enumerate(previous)])
    scale = solution.trajectory.abs().amax(-1)
    residual = ((made - solution.trajectory).abs().amax(-1) / scale).max()
    assert solution.stats.outcome is Outcome.CONVERGED
    assert float(residual) == pytest.approx(solution.stats.residual, rel=1e-6)
    assert 0 < solution.stats.residual <= 1e-3


def test_a_linear_chain_takes_one_iteration() -> None:
    matrices = torch.randn(200, 4, 4, dtype=torch.float64) / 2.5
    solution = solve_chain(
        lambda z, a, _: z @ a.T + 1, torch.randn(2, 4, dtype=torch.float64), matrices, options=NEWTON
    )
    assert solution.stats.iterations <= 2


@pytest.mark.parametrize("length", [1, 2, 5, 12])
def test_newton_is_exact_after_as_many_iterations_as_blocks(length: int) -> None:
    # A strongly nonlinear body, for which nothing but that guarantee helps.
    matrices = 3 * torch.randn(length, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = {**NEWTON, "max_iterations": length, "tolerance": 1e-6}
    solution = solve_chain(
        lambda z, a, _: torch.sin(z @ a.T), torch.ones(1, 3, dtype=torch.float64), matrices, options=options
    )
    assert solution.stats.outcome is Outcome.CONVERGED
    assert solution.stats.iterations <= length


def test_quadratic_order() -> None:
    x0, operands, shared = problem(64)
    shared = (shared[0] * 20,)
    residuals = []
    for iterations in range(1, 8):
        options = {**NEWTON, "max_iterations": iterations, "on_failure": "raise", "tolerance": 1e-15}
        try:
            residuals.append(solve_chain(tanh_step, x0, operands, shared=shared, options=options).stats.residual)
        except pcr_fx.SolveError as error:
            residuals.append(float(str(error).split("residual ")[1].split(",")[0]))
    small = [r for r in residuals if 1e-7 < r < 1e-1]
    pairs = list(zip(small, residuals[residuals.index(small[0]) + 1 :], strict=False))
    assert pairs
    assert all(after <= max(10 * before**2, 1e-14) for before, after in pairs)


def test_relu_chains_converge() -> None:
    matrices = torch.randn(300, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 3
    x0 = torch.randn(5, 4, dtype=torch.float64)
    solution = solve_chain(lambda z, a, _: z + 0.1 * torch.relu(z @ a.T), x0, matrices, options=NEWTON)
    assert solution.stats.fallback is None
    state = x0
    for matrix in matrices:
        state = state + 0.1 * torch.relu(state @ matrix.T)
    assert relative_error(solution.final, state) < 1e-9


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("length", [64, 1024])
def test_float32_is_as_accurate_as_block_by_block(length: int, seed: int) -> None:
    torch.manual_seed(seed)
    x0, operands, shared = problem(length)
    exact = sequential(tanh_step, x0, operands, shared, length)
    low = x0.float(), {name: value.float() for name, value in operands.items()}, (shared[0].float(),)
    own = (sequential(tanh_step, *low, length) - exact).abs().max()
    solution = solve_chain(tanh_step, low[0], low[1], shared=low[2], options=NEWTON)
    assert solution.stats.fallback is None
    assert (solution.trajectory - exact).abs().max() <= 2 * own


def chaotic(z: Tensor, matrix: Tensor, _: Any) -> Tensor:
    return 4 * torch.sin(3 * z @ matrix.T)


def test_hopeless_chains_fall_back() -> None:
    matrices = 3 * torch.randn(60, 5, 5, generator=torch.Generator().manual_seed(0))
    x0 = torch.ones(2, 5)
    solution = solve_chain(chaotic, x0, matrices, options=NEWTON)
    assert solution.stats.outcome is Outcome.SEQUENTIAL
    assert solution.stats.fallback in (Outcome.NON_FINITE, Outcome.STAGNATED, Outcome.ITERATION_LIMIT)
    state = x0
    for matrix in matrices:
        state = chaotic(state, matrix, ())
    torch.testing.assert_close(solution.final, state)
    with pytest.raises(pcr_fx.SolveError, match="60 blocks"):
        solve_chain(chaotic, x0, matrices, options={**NEWTON, "on_failure": "raise"})


def test_iteration_limit_and_rounding() -> None:
    x0, operands, shared = problem(64)
    limited = solve_chain(tanh_step, x0, operands, shared=shared, options={**NEWTON, "max_iterations": 1})
    assert limited.stats.fallback is Outcome.ITERATION_LIMIT
    finest = solve_chain(tanh_step, x0, operands, shared=shared, options={**NEWTON, "tolerance": 1e-30})
    assert finest.stats.outcome in (Outcome.ROUNDING, Outcome.CONVERGED)
    assert finest.stats.residual < 1e-14


def test_nan_gives_what_the_blocks_give() -> None:
    x0, operands, shared = problem(32)
    x0[1, 0] = float("nan")
    solution = solve_chain(tanh_step, x0, operands, shared=shared, options=NEWTON)
    assert solution.stats.fallback is Outcome.NON_FINITE
    expected = sequential(tanh_step, x0, operands, shared, 32)
    torch.testing.assert_close(solution.trajectory, expected, equal_nan=True)


@pytest.mark.parametrize("shared_grad", [False, True])
def test_gradcheck_twice(shared_grad: bool) -> None:
    x0, operands, shared = problem(9, batch=2, d=2)
    leaves = [x0.requires_grad_(), *(v.requires_grad_() for v in operands.values())]
    scale = shared[0].requires_grad_(shared_grad)

    def solve(x0: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        named = {"weight": weight, "bias": bias}
        return solve_chain(tanh_step, x0, named, shared=(scale,), options=NEWTON).trajectory

    assert torch.autograd.gradcheck(solve, (*leaves, scale))
    assert torch.autograd.gradgradcheck(solve, (*leaves, scale))


def test_expanding_chains_have_exact_gradients() -> None:
    """Where products of Jacobians overflow float32, the adjoint runs block by block."""
    length = 400
    matrices = torch.eye(3).mul(1.5).repeat(length, 1, 1).requires_grad_()
    # The last block forgets everything, so that the true gradient is zero almost everywhere, and finite.
    gate = torch.ones(length).index_fill(0, torch.tensor([length - 1]), 0.0)
    x0 = torch.full((1, 3), 1e-30, requires_grad=True)

    def step(z: Tensor, operands: tuple[Tensor, Tensor], _: Any) -> Tensor:
        return torch.tanh(z @ operands[0].T) * operands[1]

    solution = solve_chain(step, x0, (matrices, gate), options=NEWTON)
    gradients = torch.autograd.grad(solution.final.sum(), (x0, matrices))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_transforms() -> None:
    x0, operands, shared = problem(12)

    def final(x: Tensor) -> Tensor:
        return solve_chain(tanh_step, x, operands, shared=shared, options=NEWTON).final

    def reference(x: Tensor) -> Tensor:
        return sequential(tanh_step, x, operands, shared, 12)[-1]

    torch.testing.assert_close(torch.func.jacrev(final)(x0), torch.func.jacrev(reference)(x0))
    pairs = zip(torch.func.jvp(final, (x0,), (x0,)), torch.func.jvp(reference, (x0,), (x0,)), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected)


def test_several_states_literals_and_closures() -> None:
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x0 = torch.randn(4, 3, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)

    def momentum(state: tuple[Tensor, Tensor], force: Tensor, _: Any) -> tuple[Tensor, Tensor]:
        position, velocity = state
        velocity = 0.9 * velocity - scale * torch.sin(position + force)
        return position + velocity, velocity

    forces = torch.randn(50, 3, dtype=torch.float64)
    solution = solve_chain(momentum, x0, forces, options=NEWTON)
    state = x0
    for force in forces:
        state = momentum(state, force, ())
    torch.testing.assert_close(solution.final, state)
    got = torch.autograd.grad(solution.final[0].sum(), scale)
    torch.testing.assert_close(got, torch.autograd.grad(state[0].sum(), scale))


def test_length_alone() -> None:
    solution = solve_chain(lambda z, _, __: z + 0.1 * torch.cos(z), torch.zeros(2), length=100, options=NEWTON)
    assert solution.trajectory.shape == (100, 2)
    assert solution.stats.fallback is None


def test_two_threads() -> None:
    x0, operands, shared = problem(64)
    expected, results = sequential(tanh_step, x0, operands, shared, 64), []

    def work() -> None:
        for _ in range(5):
            results.append(solve_chain(tanh_step, x0, operands, shared=shared, options=NEWTON).trajectory)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 10
    assert all(relative_error(result, expected) < 1e-9 for result in results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, dtype=torch.int64), torch.ones(4, 2)), "got torch.int64"),
        ((torch.ones(2), [torch.ones(4, 2), torch.ones(5, 2)]), "agree on one L, got 4, 5"),
        ((torch.ones(2), ()), "no operands and no length"),
        ((torch.ones(2), torch.tensor(1.0)), "without dimensions"),
        ((torch.ones(2), [1.0]), "must be tensors, got float"),
        (((), torch.ones(4, 2)), "holds no tensor"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(pcr_fx.UnsupportedError, match=message):
        solve_chain(lambda z, operand, _: z, *arguments)


def test_a_start_needs_an_iteration() -> None:
    x0, operands, shared = problem(10)
    with pytest.raises(pcr_fx.UnsupportedError, match="does not iterate"):
        solve_chain(tanh_step, x0, operands, shared=shared, start=torch.ones(10), options={"solver": "sequential"})


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda z, a, _: torch.cat([z, z]), r"changes the shape of its state from \[3\] to \[6\]"),
        (lambda z, a, _: z.double(), "changes the dtype of its state"),
        (lambda z, a, _: torch.dropout(z, 0.5, True), "random op"),
        (lambda z, a, _: z.add_(a), "writes to an input"),
        (lambda z, a, _: z if z.sum() > 0 else -z, "cannot be traced"),
    ],
)
def test_steps_that_are_no_blocks(step: Any, message: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(pcr_fx.BodyError, match=message):
        solve_chain(step, torch.ones(3), torch.ones(5, 3), options=NEWTON)
    assert "runs block by block" not in caplog.text  # it does not run


def test_operators_keep_their_contract() -> None:
    x0, operands, shared = problem(10, batch=2)
    solve_chain(tanh_step, x0, operands, shared=shared, options=NEWTON)
    from pcr_fx.planner import plan as plans

    key = plans._plans.keys()[-1]
    every = [operands["weight"], operands["bias"]]
    trajectory = torch.ops.pcr_fx.solve(x0, every, list(shared), key, -1)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.pcr_fx.solve, (x0, every, list(shared), key, -1), test_utils=tests)
    arguments = (x0, trajectory, every, list(shared), torch.ones_like(trajectory), key, -1, [])
    torch.library.opcheck(torch.ops.pcr_fx.adjoint, arguments, test_utils=tests)
    torch.library.opcheck(torch.ops.pcr_fx.stack, ([x0, x0 + 1],), test_utils=tests)


# --- a step is captured once --------------------------------------------------------------------------------------------


def test_a_step_runs_in_python_once_for_all_calls_and_lengths() -> None:
    ran = []

    def step(z: Tensor, weight: Tensor, _: Any) -> Tensor:
        if not torch.compiler.is_dynamo_compiling():
            ran.append(None)
        return torch.tanh(z @ weight)

    x0 = torch.randn(2, 3, dtype=torch.float64)
    for length in (10, 11, 40):
        weights = torch.randn(length, 3, 3, dtype=torch.float64)
        state = x0
        for weight in weights:
            state = torch.tanh(state @ weight)
        torch.testing.assert_close(solve_chain(step, x0, weights).final, state)
    assert not ran


@pytest.mark.parametrize("kind", ["number", "tensor", "flag"])
def test_what_a_step_closes_over_is_read_at_each_call(kind: str) -> None:
    x0, weights = torch.randn(2, 3, dtype=torch.float64), torch.randn(20, 3, 3, dtype=torch.float64)

    def final(value: Any) -> tuple[Tensor, Tensor]:
        def step(z: Tensor, weight: Tensor, _: Any) -> Tensor:
            return torch.tanh(z @ weight) if value is False else torch.tanh(z @ weight) * value

        state = x0
        for weight in weights:
            state = step(state, weight, ())
        return solve_chain(step, x0, weights).final, state

    values = {"number": (0.5, 0.25), "tensor": (torch.tensor(0.5), torch.tensor(0.25)), "flag": (False, True)}[kind]
    for value in (*values, values[0]):
        torch.testing.assert_close(*final(value))


def test_solutions_keep_stats_of_their_own() -> None:
    x0, operands, shared = problem(64)
    limited = solve_chain(tanh_step, x0, operands, shared=shared, options={**NEWTON, "max_iterations": 3})
    solved = [solve_chain(tanh_step, start, operands, shared=shared, options=NEWTON) for start in (x0, 0 * x0 + 9)]
    assert solved[0].stats is not solved[1].stats
    assert solved[0].stats.residual != solved[1].stats.residual
    assert limited.stats.iterations == 3


def test_a_step_that_dynamo_cannot_capture_is_traced() -> None:
    weights = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    x0 = torch.randn(3, dtype=torch.float64)

    def descend(z: Tensor, weight: Tensor, _: Any) -> Tensor:
        return z - 0.1 * torch.func.grad(lambda y: torch.cos(y * weight).sum())(z)

    state = x0
    for weight in weights:
        state = state + 0.1 * weight * torch.sin(state * weight)
    found = solve_chain(descend, x0, weights).final
    torch.testing.assert_close(found, state)
    torch.testing.assert_close(*(torch.autograd.grad(one.sum(), weights)[0] for one in (found, state)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_is_handed_on_as_it_is(dtype: torch.dtype) -> None:
    x0 = torch.randn(3).to(dtype), torch.rand(3).to(dtype)
    shifts = torch.randn(15, 3).to(dtype)

    def step(state: tuple[Tensor, Tensor], shift: Tensor, _: Any) -> tuple[Tensor, Tensor]:
        return torch.tanh(state[0] * state[1] + shift), state[1]

    solution = solve_chain(step, x0, shifts)
    expected, state = [], (x0[0].double(), x0[1].double())
    for shift in shifts.double():
        state = step(state, shift, ())
        expected.append(state)
    for found, parts in zip(solution.trajectory, zip(*expected, strict=True), strict=True):
        assert found.dtype is dtype
        assert relative_error(found, torch.stack(parts)) < (1e-2 if dtype is torch.bfloat16 else 1e-6)


def test_a_state_of_another_structure_is_refused() -> None:
    with pytest.raises(pcr_fx.UnsupportedError, match="structure of x0"):
        solve_chain(lambda z, a, _: [z[0] + a, z[1]], (torch.ones(3), torch.ones(3)), torch.ones(5, 3))  # type: ignore[index]


def test_within_torch_compile_it_breaks_the_graph_once() -> None:
    frames = []

    def backend(graph_module: torch.fx.GraphModule, _: Any) -> Any:
        frames.append(graph_module)
        return graph_module.forward

    def whole(x: Tensor, weights: Tensor) -> Tensor:
        return solve_chain(lambda z, weight, _: torch.tanh(z @ weight), x * 2, weights, options=NEWTON).final + 1

    compiled = torch.compile(whole, backend=backend)
    x0 = torch.randn(2, 3, dtype=torch.float64)
    for length in range(20, 34):
        weights = torch.randn(length, 3, 3, dtype=torch.float64)
        torch.testing.assert_close(compiled(x0, weights), whole(x0, weights))
    assert len(frames) <= 4  # before and behind it, for one length and for any


@pytest.mark.parametrize("options", [NEWTON, {"solver": "newton"}, {"solver": "sequential"}], ids=str)
def test_complex_states(options: dict[str, Any]) -> None:
    x0 = torch.randn(2, 3, dtype=torch.complex128, requires_grad=True)
    phases = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)

    def step(z: Tensor, phase: Tensor, _: Any) -> Tensor:
        return 0.9 * z * torch.polar(torch.ones_like(phase), phase) + 0.1 * torch.sin(z.real)

    solution = solve_chain(step, x0, phases, options=options)
    state, states = x0, []
    for phase in phases:
        state = step(state, phase, ())
        states.append(state)
    expected = torch.stack(states)
    torch.testing.assert_close(solution.trajectory, expected)
    for got, true in zip(
        *(torch.autograd.grad(one.abs().sum(), (x0, phases)) for one in (solution.trajectory, expected)), strict=True
    ):
        torch.testing.assert_close(got, true)
    if options is NEWTON:
        again = solve_chain(step, x0, phases, options=options, start=solution.trajectory)
        assert again.stats.iterations < solution.stats.iterations
