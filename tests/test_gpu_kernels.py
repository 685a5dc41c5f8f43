"""The GPU's kernels against the model in float64: on a GPU if there is one, else in Triton's interpreter."""

import gc
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import relative_error
from gpu_chains import (
    BODIES,
    DEVICE,
    NEWTON,
    Recurrence,
    chain_of,
    check,
    check_stats,
    coupled,
    in_turn,
    logistic,
    net,
    normal,
    value_and_gradients,
)
from shapes import SEQUENCES, Net, assert_agree
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd

import pcr_fx
from pcr_fx.targets import TritonKernel

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("gpu_kernels")


@pytest.mark.parametrize("solver", ["newton", "sequential"])
@pytest.mark.parametrize("name, width, length, samples", in_turn(BODIES, [(2, 13, 1), (4, 7, 3), (2, 70, 2)]))
def test_a_chain_agrees_with_the_model(name: str, width: int, length: int, samples: int, solver: str) -> None:
    model = net(BODIES[name], width, length).double()
    x = normal(samples, width, dtype=torch.float64)
    transformed = check(model, x, {**NEWTON, "solver": solver}, 1e-12)
    assert chain_of(transformed)["solver_forward"] == chain_of(transformed)["solver_backward"] == solver


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_turns_of_a_sequential_loop_that_are_not_full(width: int, dtype: torch.dtype, tolerance: float) -> None:
    """A turn works on up to eight columns, and shorter chains have less than one."""
    options = {"solver": "sequential", "min_length": 2}
    for length in (*range(2, 10), 15, 16, 17):
        transformed = check(net(coupled, width, length).to(dtype), normal(3, width, dtype=dtype), options, tolerance)
        assert chain_of(transformed)["solver_forward"] == chain_of(transformed)["solver_backward"] == "sequential"


def test_sequential_inputs_that_are_not_aligned() -> None:
    x = normal(13, dtype=torch.float64)[1:].reshape(3, 4)
    assert x.is_contiguous() and x.data_ptr() % 16
    check(net(coupled, 4, 9).double(), x, {"solver": "sequential", "min_length": 2}, 1e-12)


@pytest.mark.parametrize("width, length, samples", [(1, 2, 1), (1, 33, 35), (3, 40, 2)])
def test_float32(width: int, length: int, samples: int) -> None:
    check(net(coupled, width, length), normal(samples, width), NEWTON, 2e-5)


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones, so that short chains have several."""
    from pcr_fx.targets.triton.scalars import launch as scalar_launch

    monkeypatch.setattr(scalar_launch, "SLICES", dict.fromkeys(scalar_launch.SLICES, ((16, 1), (16, 1))))


@pytest.mark.parametrize("length", [2, 15, 16, 17, 47, 48, 49])
def test_chains_of_several_slices(length: int, slices: None) -> None:
    """Each slice starts from the correction of the one before."""
    check(net(coupled, 2, length).double(), normal(3, 2, dtype=torch.float64), NEWTON, 1e-12)


@pytest.mark.parametrize("name, width", [("gated", 4), ("normed", 2), ("piecewise", 3)])
def test_bodies_in_several_slices(name: str, width: int, slices: None) -> None:
    model, x = net(BODIES[name], width, 18).double(), normal(2, width, dtype=torch.float64)
    transformed = check(model, x, NEWTON, 1e-12)
    assert chain_of(transformed)["solver_backward"] == "newton"


def test_long_chains_have_larger_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    from pcr_fx.targets.triton.scalars import launch as scalar_launch

    monkeypatch.setattr(scalar_launch, "SLICES", dict.fromkeys(scalar_launch.SLICES, ((16, 1), (64, 2))))
    few = 16 * scalar_launch.FEW_SLICES
    for length, slices in ((few, scalar_launch.FEW_SLICES), (few + 1, few // 64 + 1)):
        model = net(lambda x, w, b: 0.9 * x + 0.1 * torch.tanh(w * x + b).sum(-1, keepdim=True), 1, length).double()
        transformed = check(model, normal(1, 1, dtype=torch.float64), NEWTON, 1e-12)
        (item,) = (one.plan for one in transformed.report.chains)
        assert item.kernel.kernels._slices("forward") == slices


def test_stats_of_several_slices_are_those_of_the_solver_in_pytorch(
    slices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = net(coupled, 2, 40).double(), normal(2, 2, dtype=torch.float64)
    check_stats(model, x, monkeypatch)


def test_memory_of_slices_is_counted(slices: None) -> None:
    """States of each slice, and what it sends: words of 64 bits, for corrections and for how it ended."""
    transformed = pcr_fx.transform(net(coupled, 3, 79), (normal(2, 3),), options=NEWTON)
    (item,) = (one.plan for one in transformed.report.chains)
    assert all(part.data_ptr() % 16 == 0 for part in item.kernel.kernels._messages(normal(1), 5, 10))
    assert item.kernel.scratch_bytes(2, 10) - item.kernel.scratch_bytes(2) == 2 * 5 * (3 * (16 + 2 * 11) + 6) * 4


@pytest.mark.parametrize(
    "name, solver",
    [("positions", "newton"), ("one position at first", "sequential"), ("one for all samples", "sequential")],
)
def test_shapes_one_after_another(name: str, solver: str) -> None:
    model = Net(5).double().to(DEVICE)
    assert_agree(lambda x, c: pcr_fx.transform(model, (x, c), {**NEWTON, "solver": solver}), model, SEQUENCES[name])


def test_no_samples() -> None:
    model = net(coupled, 2, 9)
    check(model, normal(0, 2), {**NEWTON, "solver": "sequential"}, 1e-6)


def test_inputs_that_are_not_contiguous() -> None:
    model = net(coupled, 3, 9).double()
    check(model, normal(3, 4, dtype=torch.float64).mT, NEWTON, 1e-12)


@pytest.mark.parametrize("solver", ["newton", "sequential"])
def test_shared_weights_and_operands_of_each_sample(solver: str) -> None:
    torch.manual_seed(0)
    inputs = normal(37, 5, 3, dtype=torch.float64)
    check(Recurrence(2).double().to(DEVICE), inputs, {**NEWTON, "solver": solver}, 1e-12)


def test_samples_that_newton_does_not_solve_are_evaluated_block_by_block(slices: None) -> None:
    model = net(logistic, 1, 100).double()
    x = torch.tensor([[0.0], [0.3], [0.7]], dtype=torch.float64, device=DEVICE)
    transformed = pcr_fx.transform(model, (x,), options={"solver": "newton"})
    assert (transformed(x)[0] == 0).all()
    # Chaos makes one of any other rounding: the kernel's own loop is what it is compared with.
    in_sequence = pcr_fx.transform(model, (x,), options={"solver": "sequential"})
    assert torch.equal(transformed(x), in_sequence(x))
    assert chain_of(transformed)["fallbacks"] == 1


def test_a_slice_that_ends_by_rounding_is_told_of_though_the_next_converges(slices: None) -> None:
    model = net(lambda x, w, b: (torch.cos(x) + b) - b, 1, 24)
    with torch.no_grad():
        for index, block in enumerate(model):
            block.bias.fill_(100.0 if index < 16 else 0.0)
    transformed = pcr_fx.transform(model, (normal(24, 1),), options={**NEWTON, "tolerance": 1e-7})
    (item,) = (one.plan for one in transformed.report.chains)
    operands = [torch.stack([block.bias for block in model])]
    for _ in range(5):
        _, stats = item.kernel.solve_newton(item.program.call_with(normal(24, 1), operands, []), 1e-7, 20)
        assert ((stats[:, 0] != 0) | (stats[:, 2] <= 1e-7)).all()
        assert (stats[:, 0] == 1).any()


# Two numbers a sample take the kernels of scalars, five and six those of tiles.
@pytest.mark.parametrize("width, length", [(2, 30), (6, 9)])
def test_a_solve_that_fails_raises_where_that_is_asked_for(width: int, length: int) -> None:
    model, x = net(coupled, width, length), normal(2, width)
    raising = pcr_fx.transform(model, (x,), options={**NEWTON, "max_iterations": 1})
    with pytest.raises(pcr_fx.SolveError, match="iteration limit"):
        raising(x)


@pytest.mark.parametrize("width, length", [(1, 20), (5, 12)])
def test_states_that_become_infinite_are_returned_as_they_are(width: int, length: int, slices: None) -> None:
    model = net(lambda x, w, b: x * x + 0 * b, width, length)
    x = torch.tensor([0.5, 3.0, math.nan], device=DEVICE)[:, None].repeat(1, width)
    transformed = pcr_fx.transform(model, (x,), options={"solver": "newton"})
    torch.testing.assert_close(transformed(x), model(x), equal_nan=True)


@pytest.mark.parametrize("solver", ["newton", "sequential"])
def test_a_last_block_that_is_not_finite_leaves_other_gradients_alone(solver: str) -> None:
    """Nothing is pulled back through it into the last cotangent: 0 times infinity would be."""
    model, x = net(lambda x, w, b: x * x + b * x, 1, 20).double(), normal(2, 1, dtype=torch.float64) / 4
    with torch.no_grad():
        for block in model:
            block.bias.fill_(0.1)
        model[-1].bias.fill_(math.nan)
    transformed = pcr_fx.transform(model, (x,), options={"solver": solver})
    ours, theirs = (torch.autograd.grad(net_(x).sum(), model[-1].bias)[0] for net_ in (transformed, model))
    assert torch.isfinite(theirs).all()
    torch.testing.assert_close(ours, theirs)


def test_gradients_of_a_growing_adjoint(slices: None) -> None:
    model = net(lambda x, w, b: 1.5 * x + F.linear(x, w, b), 2, 60).double()
    check(model, normal(2, 2, dtype=torch.float64), {"solver": "newton"}, 1e-12)


@pytest.mark.parametrize("width, length", [(2, 40), (6, 9)])
def test_adjoints_that_are_not_solved_go_block_by_block(
    width: int, length: int, slices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an iteration only a sample is solved to which no gradient comes."""
    from pcr_fx.targets.triton import kernel as triton_kernel

    monkeypatch.setattr(triton_kernel, "_ADJOINT_ITERATIONS", 0)
    outcomes, solve = [], TritonKernel.solve_adjoint

    def watched(*arguments: Any) -> Any:
        results = solve(*arguments)
        outcomes.append(results[1][:, 0].tolist())
        return results

    monkeypatch.setattr(TritonKernel, "solve_adjoint", watched)
    model, x = net(coupled, width, length).double(), normal(3, width, dtype=torch.float64).requires_grad_()
    transformed = pcr_fx.transform(model, (x,), options=NEWTON)
    weights = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64, device=DEVICE)[:, None]
    inputs = [x, *model.parameters()]
    ours, theirs = (torch.autograd.grad((net_(x) * weights).sum(), inputs) for net_ in (transformed, model))
    assert outcomes == [[4, 0, 4]]
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(ours, theirs, strict=True))


def test_auto_goes_by_length_and_samples() -> None:
    model = net(coupled, 1, 130)
    for samples, expected in ((1, "newton"), (600, "sequential")):
        x = normal(samples, 1)
        transformed = pcr_fx.transform(model, (x,), options={"planning": "estimated"})
        assert chain_of(transformed)["solver_forward"] == expected


def test_what_is_measured_is_right_after() -> None:
    """A GPU's kernels are for all blocks of a chain: no fewer may be measured."""
    transformed = check(net(coupled, 2, 30).double(), normal(3, 2, dtype=torch.float64), {"plan_cache": False}, 1e-12)
    (item,) = (one.plan for one in transformed.report.chains)
    timings = item.choice(3).timings
    assert {"forward", "backward"} <= {one.direction for one in timings if "fused" in one.way and one.seconds}


def test_memory_that_is_not_there_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    from pcr_fx.ways import case

    monkeypatch.setattr(case, "BYTES_UNASKED", 10)
    model, x = net(coupled, 2, 20), normal(3, 2)
    transformed = pcr_fx.transform(model, (x,), options={"solver": "sequential", "memory_limit": 1000})
    torch.testing.assert_close(transformed(x), model(x))
    assert "fused kernels need 1.969 KiB" in str(transformed.report)


def test_a_node_waits_for_nothing_until_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(coupled, 2, 20), normal(3, 2)
    transformed = pcr_fx.transform(model, (x,), options={"solver": "newton"})
    with monkeypatch.context() as patch:
        patch.setattr(pcr_fx.record.Pending, "take", lambda pending: pytest.fail("read on the host"))
        value_and_gradients(transformed, x)
    assert chain_of(transformed)["iterations"] in range(1, 8)


@pytest.mark.parametrize(
    "options, waits",
    [
        ({"solver": "newton"}, False),
        ({"planning": "estimated"}, False),
        ({"solver": "sequential"}, False),
        ({"solver": "newton", "on_failure": "raise"}, True),
        ({"solver": "newton", "kernels": False}, True),
        ({"solver": "sequential", "kernels": False}, False),
    ],
)
def test_a_cuda_graph_may_hold_what_nothing_waits_for(options: dict[str, Any], waits: bool) -> None:
    """Compilers keep operators with this tag out of CUDA graphs, and put all others in."""
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, inputs: list[Tensor]) -> fx.GraphModule:
        graphs.append(graph)
        return graph

    model, x = net(coupled, 2, 130), normal(3, 2)
    inner = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    value_and_gradients(torch.compile(model, backend="deeppcr", options={**options, "inner_backend": inner}), x)
    called = [
        node.target
        for graph in graphs
        for node in graph.graph.nodes
        if str(node.target).startswith(("pcr_fx.solve", "pcr_fx.adjoint"))
    ]
    assert len(called) == 2
    assert all((torch.Tag.cudagraph_unsafe in target.tags) is waits for target in called)


def test_a_solve_keeps_none_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a CUDA graph it would be the graph's."""
    model, x = net(coupled, 2, 20), normal(3, 2)
    transformed, made, solve = pcr_fx.transform(model, (x,), options=NEWTON), [], TritonKernel.solve_newton

    def watched(*arguments: Any, **named: Any) -> Any:
        results = solve(*arguments, **named)
        made.append(weakref.ref(results[1]))
        return results

    monkeypatch.setattr(TritonKernel, "solve_newton", watched)
    transformed(x)
    gc.collect()
    assert made and not any(reference() is not None for reference in made)


def test_the_worst_solve_since_somebody_asked_is_told() -> None:
    model = net(logistic, 1, 100).double()
    transformed = pcr_fx.transform(model, options={"solver": "newton"})
    chaotic, at_rest = torch.full((1, 1), 0.3), torch.zeros(1, 1)
    for x in (at_rest, chaotic, at_rest):
        transformed(x.double().to(DEVICE))
    assert chain_of(transformed)["fallbacks"] == 1
    transformed(at_rest.double().to(DEVICE))
    chain = chain_of(transformed)
    assert chain["fallbacks"] == 1 and chain["fallback_reason"] is None


def test_without_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, pcr_fx\n"
        "from pcr_fx.targets import TritonKernel\n"
        "from pcr_fx.planner import plan\n"
        "plan.KERNELS['cpu'] = TritonKernel\n"
        "model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh()) for _ in range(9)))\n"
        "x = torch.randn(3, 2)\n"
        "fast = pcr_fx.transform(model, (x,), options={'planning': 'estimated'})\n"
        "assert torch.allclose(fast(x), model(x))\n"
        "assert 'Triton is not installed' in str(fast.report), fast.report\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent)


def compiled(*command: str) -> str:
    """What a Python command prints in which Triton compiles, and interprets nothing."""
    root = Path(__file__).parent.parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(root)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles for GPUs on Linux only")
def test_kernels_compile_for_a_gpu_and_do_not_spill() -> None:
    printed = compiled("-m", "benchmarks.gpu_resources", "--widths", "1", "3", "4", "8", "64", "128")
    assert "newton, adjoint" in printed and "compose, adjoint" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles for GPUs on Linux only")
def test_kernels_compile_from_the_arguments_they_are_called_with() -> None:
    names = compiled("tests/compiled_launches.py").split()
    assert set(names) == set("newton linearise decide compose apply sequential gradients".split())


def test_solve_nodes_have_gpu_kernels() -> None:
    """That the other tests test what they say."""
    transformed = pcr_fx.transform(net(coupled, 2, 9), (normal(1, 2),))
    plans = [item.plan for item in transformed.report.chains]
    assert all(isinstance(item.kernel, TritonKernel) for item in plans if item is not None) and plans
