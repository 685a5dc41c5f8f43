"""Generated kernels, block by block, against their plain twin: PyTorch's ops in float64."""

import math
import platform
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import relative_error, value_and_gradients
from kernel_cases import BODIES, WIDTH, Deep, Recurrence, assert_as_good, by_kernel, states
from models import plain_mlp
from torch import Tensor, nn

import pcr_fx
from pcr_fx.registry import Registry
from pcr_fx.targets import CppKernel
from pcr_fx.targets.cpp import build

pytestmark = pytest.mark.usefixtures("kernel_cache")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", BODIES)
def test_every_body_agrees_with_its_twin(name: str, dtype: torch.dtype) -> None:
    batch = 3 if dtype == torch.float64 else 9  # vectors of features, and of samples
    assert_as_good(Deep(name, 9).to(dtype), states(name, batch, dtype))


@pytest.mark.parametrize("batch", [1, 3, 16, 33])
@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 7, 8, 9, 1023, 1024, 1025])
def test_every_length_and_batch(length: int, batch: int) -> None:
    for dtype in (torch.float32, torch.float64):
        assert_as_good(Deep("residual", length).to(dtype), states("residual", batch, dtype), min_length=2)


@pytest.mark.parametrize("batch", [2, 33])
@pytest.mark.parametrize("length", [9, 780, 781, 1601])  # 780 blocks are what threads sum for themselves at a time
def test_threads_share_the_samples(length: int, batch: int, threads: int) -> None:
    for dtype in (torch.float32, torch.float64):
        assert_as_good(Deep("residual", length).to(dtype), states("residual", batch, dtype))


class Driven(nn.Module):
    """One matrix for all blocks, a vector for each, and an input for each and each sample."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(length)
        self.shared = nn.Parameter(width**-0.5 * torch.randn(width, width, generator=draw, dtype=torch.float64))
        rows = torch.randn(length, 2, width, generator=draw, dtype=torch.float64)
        self.each = nn.ParameterList([nn.Parameter(row[0]) for row in rows])
        self.drive = nn.Parameter(rows[:, 1].clone())

    def forward(self, x: Tensor) -> Tensor:
        drive = x[:, None] * self.drive
        for block, each in enumerate(self.each):
            x = x + 0.1 * torch.tanh(x @ self.shared + each + drive[:, block])
        return x


@pytest.mark.parametrize("length, width", [(9, 3), (11, 190)])
@pytest.mark.parametrize("batch", [1, 2, 5, 33])
def test_threads_share_samples_of_every_kind_of_operand(length: int, width: int, batch: int, threads: int) -> None:
    draw = torch.Generator().manual_seed(batch)
    for dtype in (torch.float32, torch.float64):
        assert_as_good(Driven(length, width).to(dtype), torch.randn(batch, width, generator=draw, dtype=dtype))


def test_a_block_with_more_numbers_than_threads_sum_at_a_time(threads: int) -> None:
    width = 190
    layers = [nn.Linear(width, width, dtype=torch.float64) for _ in range(9)]
    model = nn.Sequential(*(layer for linear in layers for layer in (linear, nn.Tanh())))
    assert_as_good(model, torch.randn(7, width, dtype=torch.float64))


class Matrices(nn.Module):
    """Blocks with matrices `[hidden, width]` and `[width, hidden]`: of each block, of all, or one that is used twice."""

    def __init__(self, kind: str, hidden: int, width: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(hidden)
        pairs = [width**-0.5 * torch.randn(2, hidden, width, generator=draw, dtype=torch.float64) for _ in range(9)]
        if kind != "of each":
            pairs = pairs[:1]
        self.into = nn.ParameterList(nn.Parameter(pair[0].clone()) for pair in pairs)
        self.back = nn.ParameterList(nn.Parameter(pair[1].T.clone()) for pair in pairs if kind != "used twice")

    def forward(self, x: Tensor) -> Tensor:
        for block in range(9):
            into = self.into[block % len(self.into)]
            back = self.back[block % len(self.back)] if len(self.back) else into.T
            x = x + 0.1 * torch.tanh(x @ into.T) @ back.T
        return x


@pytest.mark.parametrize("kind", ["of each", "of all", "used twice"])
@pytest.mark.parametrize("hidden, width", [(23, 17), (66, 130)])
@pytest.mark.parametrize("batch", [1, 45])
def test_gradients_of_matrices(kind: str, hidden: int, width: int, batch: int, threads: int) -> None:
    """Large ones are products of matrices where lanes are samples, the last of which may be idle."""
    for dtype in (torch.float32, torch.float64):
        model = Matrices(kind, hidden, width).to(dtype)
        x = torch.randn(batch, width, generator=torch.Generator().manual_seed(batch), dtype=dtype)
        assert_as_good(model, x)
        matrices, *_ = by_kernel(model, x).report.chains[0].plan.kernel.summed
        assert matrices == sum(p.numel() for p in model.parameters()) // (9 if kind == "of each" else 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sample", [0, 18])
def test_a_sample_that_is_not_finite_in_gradients_of_matrices(sample: int, bad: float) -> None:
    """The last one, too, which idle lanes repeat: their share is not in the sum, and 0 times infinity is not 0."""
    model, x = Matrices("of each", 23, 17).float(), torch.randn(19, 17, generator=torch.Generator().manual_seed(0))
    x[sample, 3] = bad
    inputs = list(model.parameters())
    pairs = zip(value_and_gradients(by_kernel(model, x), inputs, x), value_and_gradients(model, inputs, x), strict=True)
    for ours, theirs in pairs:
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.fixture(params=[("-mno-avx512f", 32), ("-mno-avx", 16)], ids=["AVX2", "SSE"])
def narrow_vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Code for processors with narrower vectors than this one may have."""
    if platform.machine() != "x86_64":
        pytest.skip("flags of other compilers")
    flag, size = request.param
    monkeypatch.setattr(build, "_FLAGS", [*build._FLAGS, flag])
    monkeypatch.setattr("pcr_fx.targets.cpp.kernel._VECTOR_BYTES", size)
    monkeypatch.setattr("pcr_fx.planner.plan._plans", Registry())
    build._toolchain.cache_clear()
    yield
    build._toolchain.cache_clear()


@pytest.mark.parametrize("batch", [3, 7, 45])
def test_narrow_vectors(narrow_vectors: None, batch: int) -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(batch, 17, generator=torch.Generator().manual_seed(batch), dtype=dtype)
        assert_as_good(Matrices("of each", 23, 17).to(dtype), x)
        for solver in ("sequential", "newton"):
            assert_as_good(Deep("gated", 9).to(dtype), states("gated", batch, dtype), solver=solver)


class Tabled(nn.Module):
    """Blocks that share a table, of which they read a part."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(rows, 8, generator=torch.Generator().manual_seed(0)) / 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(12):
            x = torch.tanh(x @ self.table[:8])
        return x


@pytest.mark.parametrize("rows, batch", [(3000, 7), (3000, 16), (40_000, 7), (200, 7), (200, 16), (200, 65)])
def test_shared_gradients_may_be_large(rows: int, batch: int) -> None:
    """A stack has no room for a vector in place of each of their numbers."""
    assert_as_good(Tabled(rows), torch.randn(batch, 8, generator=torch.Generator().manual_seed(batch)))


class Normed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(9):
            x = x + torch.tanh(F.layer_norm(x, (self.width,)))
        return x


def test_wide_states_have_no_vectors_of_samples_and_wider_ones_no_kernel() -> None:
    """What the stack has room for: of 1500 numbers each alone, of 30,000 none."""
    draw = torch.Generator().manual_seed(0)
    assert_as_good(Normed(1500), torch.randn(7, 1500, generator=draw), planning="estimated")
    model, x = Normed(30_000), torch.randn(7, 30_000, generator=draw)
    fast = pcr_fx.transform(model, x, {"kernels": True, "planning": "estimated"})
    assert "too many for the stack" in fast.report.chains[0].reason
    for ours, theirs in zip(value_and_gradients(fast, [], x), value_and_gradients(model, [], x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_empty_batch_runs_in_torch_ops() -> None:
    model = Deep("residual", 9)
    x = torch.randn(0, WIDTH, dtype=torch.float64)
    assert pcr_fx.transform(model, x)(x).shape == (0, WIDTH)


def test_a_kernel_writes_all_that_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is handed to kernels holds NaN beforehand."""
    new_empty, empty_like = Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(math.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(math.nan))
    small = [(Deep("residual", 9), states("residual", batch)) for batch in (1, 3, 9, 33)]
    large = [(Matrices("of each", 23, 17).double(), torch.randn(batch, 17).double()) for batch in (3, 9, 33)]
    for model, x in (*small, *large):
        for got in value_and_gradients(by_kernel(model, x), list(model.parameters()), x):
            assert torch.isfinite(got).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("batch", [2, 17])
# Not elu: eager\'s gradient at NaN is 1 in a small tensor and NaN in a large one.
@pytest.mark.parametrize("name", ["residual", "gelu", "relu", "silu", "softmax", "piecewise", "softplus", "reduced"])
def test_nan_and_infinity_go_where_they_go_in_eager(name: str, batch: int, bad: float) -> None:
    model, x = Deep(name, 9).float(), states(name, batch, torch.float32)
    x[1, 2] = bad
    pairs = zip(
        value_and_gradients(by_kernel(model, x), list(model.parameters()), x),
        value_and_gradients(model, list(model.parameters()), x),
        strict=True,
    )
    for ours, theirs in pairs:
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())


# --- threads, and what is no kernel ----------------------------------------------------------------------------------


def test_two_threads_share_a_module() -> None:
    model, x = Deep("residual", 300), states("residual", 33)
    fast = by_kernel(model, x)
    expected = value_and_gradients(model, list(model.parameters()), x)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                for got, true in zip(value_and_gradients(fast, list(model.parameters()), x), expected, strict=True):
                    assert relative_error(got, true) <= 1e-9
                with torch.no_grad():
                    assert relative_error(fast(x), expected[0]) <= 1e-9
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_an_op_without_a_form_is_named_and_runs_in_torch_ops() -> None:
    class Inverted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(9)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x)).lgamma()
            return x

    model, x = Inverted().double(), torch.randn(3, 4, dtype=torch.float64)
    fast = pcr_fx.transform(model, x, {"solver": "sequential"})
    assert "aten.lgamma" in fast.report.chains[0].reason
    assert relative_error(fast(x), model(x)) <= 1e-12


def test_kernels_can_be_refused() -> None:
    model, x = plain_mlp(9), torch.randn(3, 4)
    fast = pcr_fx.transform(model, x, {"kernels": False})
    assert "kernels=False" in fast.report.chains[0].reason


@pytest.mark.parametrize("batch", [1, 3, 5, 33])  # 5 is the width too
@pytest.mark.parametrize("kind", [nn.GRUCell, nn.LSTMCell])
def test_recurrences_whose_inputs_follow_the_batch(kind: Any, batch: int) -> None:
    torch.manual_seed(batch)
    model = Recurrence(kind(5, 5)).double()
    count = 2 if kind is nn.LSTMCell else 1
    inputs = [
        torch.randn(30, batch, 5, dtype=torch.float64),
        *(torch.randn(batch, 5, dtype=torch.float64) for _ in range(count)),
    ]
    fast = pcr_fx.transform(model, tuple(inputs))
    assert isinstance(fast.report.chains[0].plan.kernel, CppKernel)
    results = []
    for run in (model, fast, fast):  # the first call is an operator's, the second goes straight to the kernel
        leaves = [value.clone().requires_grad_() for value in inputs]
        output = run(*leaves)
        last = output[0] * output[1] if count == 2 else output
        results.append([last.detach(), *torch.autograd.grad(last.sum(), [*leaves, *model.parameters()])])
    for ours in results[1:]:
        for got, true in zip(ours, results[0], strict=True):
            assert relative_error(got, true) <= 1e-11


@pytest.mark.parametrize("calls_before", [0, 2])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_jit_trace_records_the_chain(calls_before: int) -> None:
    model, x = Deep("residual", 9 + calls_before), states("residual", 3)
    fast = pcr_fx.transform(model)
    for _ in range(calls_before):
        fast(x)
    traced = torch.jit.trace(fast, x)
    for other in (x, 2 * x):
        torch.testing.assert_close(traced(other), model(other))


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_only_the_states_that_are_wanted_are_kept(batch: int, threads: int) -> None:
    model, x = Deep("residual", 12), states("residual", batch, torch.float64)
    made = pcr_fx.transform(model.double(), x, {"solver": "sequential"}).report.chains[0].plan
    assert made is not None and isinstance(made.kernel, CppKernel)
    draw = torch.Generator().manual_seed(0)
    operands = [
        0.3 * torch.randn(12, *spec.shape, generator=draw, dtype=spec.dtype) for spec in made.program.signature.operands
    ]
    call = made.program.call_with(x, operands, [])
    whole = made.kernel.solve(call)
    for wanted in ((11,), (0,), (0, 5, 11), tuple(range(12))):
        for used in (None, 1):
            kept = made.kernel.solve_states(call, wanted, used)
            assert torch.equal(torch.stack(list(kept)), whole[list(wanted)])
