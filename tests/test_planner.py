"""The planner that measures: what it chooses, what it keeps, when it looks again, and when it leaves a chain alone."""

import gc
import json
import logging
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import pcr_fx
from pcr_fx.__main__ import main
from pcr_fx.body.isolation import apart, isolated
from pcr_fx.kernels import ChainKernel
from pcr_fx.planner import Plan, measure, plan, rule
from pcr_fx.planner import cache as planner_cache

DIRECTIONS = ("forward", "backward")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Measurements of this test alone."""
    monkeypatch.setenv("PCR_FX_CACHE_DIR", str(tmp_path))
    plan._plans.clear()
    return tmp_path / "plans"


class Net(nn.Module):
    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(length)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(length)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.1 * torch.tanh(layer(x))
        return x


def in_ops(**options: Any) -> dict[str, Any]:
    """Without kernels nothing is compiled, which takes longer than all else here."""
    return {"kernels": False, **options}


def chain_of(fast: Any) -> dict[str, Any]:
    (chain,) = fast.report.to_dict()["chains"]
    return chain


@pytest.mark.parametrize("length, width, batch", [(600, 2, 1), (40, 3, 5), (9, 48, 33)])
def test_the_fastest_of_what_was_measured_is_chosen(length: int, width: int, batch: int) -> None:
    model, x = Net(length, width), torch.randn(batch, width)
    fast = pcr_fx.transform(model, x, in_ops())
    got, expected = fast(x), model(x)
    torch.testing.assert_close(got, expected)
    gradients = torch.autograd.grad(got.sum(), list(fast.parameters()))
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.sum(), list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    chain = chain_of(fast)
    seconds = {(t["direction"], t["way"]): t["seconds"] for t in chain["timings"] if t["seconds"] is not None}
    beside = seconds.pop(("forward", "stacking operands")) + seconds.pop(("backward", "handing out gradients"))
    eager = sum(seconds.pop((direction, "eager")) for direction in DIRECTIONS)
    best = {d: min((s, way) for (of, way), s in seconds.items() if of == d) for d in DIRECTIONS}
    assert chain["left_alone"] == (0.95 * eager <= sum(least for least, _ in best.values()) + beside)
    if not chain["left_alone"]:
        assert all(chain[f"solver_{direction}"] == best[direction][1] for direction in DIRECTIONS)
    # Every way is either timed or has its reason.
    assert {t["way"] for t in chain["timings"]} >= {"eager", "sequential", "newton", "picard", "jacobi"}
    assert all(t["seconds"] is not None or t["note"] for t in chain["timings"])
    assert "fastest of what was measured" in chain["reason"]


def rigged(**seconds: float) -> Any:
    """`measure` with an outcome of its own: `forward_newton=1e-3`, say."""
    calls = []

    def measured(case: Any, settings: Any, tensors: Any, needs_gradient: bool, with_eager: bool = True) -> Any:
        calls.append(needs_gradient)
        named = ((name.partition("_"), value) for name, value in seconds.items())
        return tuple(
            plan.Timing(way, direction, value, iterations=3 if way == "newton" else 0)
            for (direction, _, way), value in named
            if needs_gradient or direction == "forward"
        )

    return measured, calls


def test_forward_and_backward_are_chosen_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, _ = rigged(
        forward_eager=9.0, forward_newton=2.0, forward_sequential=1.0,
        backward_eager=9.0, backward_newton=2.0, backward_sequential=3.0,
    )  # fmt: skip
    monkeypatch.setattr(plan, "measure", measured)
    model, x = Net(20, 3), torch.randn(4, 3)
    fast = pcr_fx.transform(model, x, in_ops())
    fast(x).sum().backward()
    chain = chain_of(fast)
    assert (chain["solver_forward"], chain["solver_backward"]) == ("sequential", "newton")
    assert not chain["left_alone"]
    text = str(fast.report)
    assert "forward by" in text and "newton 2e+03 ms (3 iterations)" in text


@pytest.mark.parametrize("through", ["transform", "torch.compile"])
def test_what_eager_does_best_is_left_alone(through: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, _ = rigged(forward_eager=1.0, forward_sequential=2.0, backward_eager=1.0, backward_sequential=2.0)
    monkeypatch.setattr(plan, "measure", measured)
    model, x = Net(20, 3), torch.randn(4, 3)
    if through == "transform":
        fast = pcr_fx.transform(model, x, in_ops())
        report = lambda: fast.report  # noqa: E731
    else:
        torch._dynamo.reset()
        fast = torch.compile(model, backend="deeppcr", options=in_ops(inner_backend="eager"))
        report = pcr_fx.report
    assert torch.equal(fast(x), model(x))
    fast(x).sum().backward()
    chain = chain_of(type("Holder", (), {"report": report()}))
    assert chain["left_alone"] and chain["reason"] == "the model's own ops are fastest of what was measured"
    assert "left alone" in str(report()) or "the model's own ops" in str(report())


def test_measured_once_for_a_size_and_kept_on_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, calls = rigged(forward_eager=2.0, forward_sequential=1.0)
    monkeypatch.setattr(plan, "measure", measured)
    model = Net(20, 3)
    fast = pcr_fx.transform(model, options=in_ops())
    with torch.no_grad():
        for batch in (5, 6, 7, 5, 17, 16):  # as many bits of samples are one size
            x = torch.randn(batch, 3)
            torch.testing.assert_close(fast(x), model(x))
    assert len(calls) == len(list(cache.glob("*.json"))) == 2
    # Another process starts with nothing in memory.
    plan._plans.clear()
    again = pcr_fx.transform(model, options=in_ops())
    with torch.no_grad():
        again(torch.randn(6, 3))
    assert len(calls) == 2
    assert chain_of(again)["timings"] == chain_of(fast)["timings"]
    # One of another version of the package may not be as fast.
    monkeypatch.setattr(planner_cache, "_code", lambda: "another version")
    plan._plans.clear()
    with torch.no_grad():
        pcr_fx.transform(model, options=in_ops())(torch.randn(6, 3))
    assert len(calls) == 3


def test_samples_that_other_native_code_serves_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, calls = rigged(forward_eager=2.0, forward_sequential=1.0)
    monkeypatch.setattr(plan, "measure", measured)
    monkeypatch.setattr("pcr_fx.kernels.chain_kernel._VECTOR_SAMPLES", {lanes: 6 for lanes in (2, 4, 8, 16)})
    fast = pcr_fx.transform(Net(21, 3))
    with torch.no_grad():
        for batch in (4, 5, 6, 7):
            fast(torch.randn(batch, 3))
    assert len(calls) == 2


def test_a_kernel_is_refused_where_its_lanes_are_features_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcr_fx.planner.rule.KERNEL_OPERATIONS_MEASURED", 1)
    monkeypatch.setattr("pcr_fx.kernels.chain_kernel._VECTOR_GRADIENTS", 0)
    x = torch.randn(16, 3)
    planned = pcr_fx.transform(Net(20, 3), x, {"planning": "estimated"}).report.chains[0].plan
    (_, none), (_, refused) = (rule.candidates(planned._case(16), direction) for direction in DIRECTIONS)
    kernel = "sequential (native kernel)"
    assert kernel not in none and "gradients are too large" in refused[kernel]
    assert "fewer than" in rule.candidates(planned._case(1), "forward")[1][kernel]


def test_options_turn_the_cache_and_the_measuring_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, calls = rigged(forward_eager=2.0, forward_sequential=1.0)
    monkeypatch.setattr(plan, "measure", measured)
    x = torch.randn(4, 3)
    with torch.no_grad():
        pcr_fx.transform(Net(20, 3), x, in_ops(plan_cache=False))(x)
        assert len(calls) == 1 and not cache.exists()
        fast = pcr_fx.transform(Net(400, 3), x, in_ops(planning="estimated"))
        fast(x)
    assert len(calls) == 1 and not cache.exists()
    assert chain_of(fast)["solver_forward"] == "newton" and chain_of(fast)["timings"] == []
    assert "auto takes Newton forward up to" in chain_of(fast)["reason"]


def test_kept_measurements_are_shown_and_cleared(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(4, 3)
    with torch.no_grad():
        pcr_fx.transform(Net(20, 3), x, in_ops())(x)
    (kept,) = pcr_fx.cached_plans()
    assert (kept["chain"]["length"], kept["chain"]["samples"], kept["chain"]["dimension"]) == (20, 4, 3)
    main(["plans"])
    shown = capsys.readouterr().out
    assert "1 measurements in" in shown and "20 blocks, 4 x 3" in shown and "eager" in shown
    main(["plans", "--clear"])
    assert "1 measurements deleted" in capsys.readouterr().out
    assert pcr_fx.cached_plans() == [] and pcr_fx.clear_plans() == 0


@pytest.mark.parametrize("content", ["", "{", '{"timings": 3}', '{"timings": [{"pace": 1}]}'])
def test_a_measurement_that_cannot_be_read_is_made_anew(
    content: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = Net(20, 3), torch.randn(4, 3)
    with torch.no_grad():
        pcr_fx.transform(model, x, in_ops())(x)
        (path,) = cache.glob("*.json")
        path.write_text(content)
        plan._plans.clear()
        with caplog.at_level(logging.WARNING, "pcr_fx"):
            fast = pcr_fx.transform(model, x, in_ops())
            torch.testing.assert_close(fast(x), model(x))
    assert "it is made anew" in caplog.text
    assert json.loads(path.read_text())["timings"]


def test_a_folder_that_cannot_be_written_to_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PCR_FX_CACHE_DIR", str(tmp_path / "file"))
    model, x = Net(20, 3), torch.randn(4, 3)
    with torch.no_grad():
        torch.testing.assert_close(pcr_fx.transform(model, x, in_ops())(x), model(x))
    assert "measurements cannot be kept" in caplog.text


SCRIPT = """
import torch, pcr_fx
from test_planner import Net
model = Net(20, 3)
for batch in range(1, 9):  # four sizes, with gradients and without
    x = torch.randn(batch, 3)
    with torch.no_grad():
        torch.testing.assert_close(pcr_fx.transform(model, x, {"kernels": False})(x), model(x))
"""


def test_processes_share_a_cache(cache: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), str(Path.cwd())))}
    command = [sys.executable, "-c", SCRIPT]
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda _: subprocess.run(command, env=environment, capture_output=True, text=True), range(3)))
    for done in runs:
        assert done.returncode == 0 and "cannot be" not in done.stderr, done.stderr
    assert len(pcr_fx.cached_plans()) == len(list(cache.iterdir())) == 8


def test_drift_is_noticed_and_measured_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Training may carry a chain to where Newton needs far more iterations than when it was chosen."""
    measured, calls = rigged(forward_eager=2.0, forward_newton=1.0)
    monkeypatch.setattr(plan, "measure", measured)
    model, x = Net(30, 3), torch.randn(4, 3)
    fast = pcr_fx.transform(model, x, in_ops())
    with torch.no_grad():
        fast(x)
        fast(x)
        assert len(calls) == 1 and chain_of(fast)["iterations"] <= 5
        for layer in fast.get_submodule("layers"):
            layer.weight.mul_(60.0)
        slower, more = rigged(forward_eager=2.0, forward_newton=9.0, forward_sequential=1.0)
        monkeypatch.setattr(plan, "measure", slower)
        with caplog.at_level(logging.INFO, "pcr_fx"):
            torch.testing.assert_close(fast(x), model_with(fast, x), atol=1e-4, rtol=1e-4)
        assert "measured anew at the next call" in caplog.text
        fast(x)
    assert more == [False] and chain_of(fast)["solver_forward"] == "sequential"


def model_with(fast: nn.Module, x: Tensor) -> Tensor:
    for layer in fast.get_submodule("layers"):  # type: ignore[union-attr]
        x = x + 0.1 * torch.tanh(layer(x))
    return x


def test_where_the_budget_ends_first_the_rule_decides() -> None:
    model, x = Net(300, 3), torch.randn(4, 3)
    fast = pcr_fx.transform(model, x, in_ops(planning_budget=1e-9))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    chain = chain_of(fast)
    assert chain["reason"].startswith("the budget ended before ways had been timed; ")
    assert chain["solver_forward"] == "newton" and not chain["left_alone"]


def test_ways_for_which_memory_is_too_short_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any, **__: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(measure, "solve_iteratively", exhausted)
    monkeypatch.setattr(torch, "stack", exhausted)
    model, x = Net(600, 2), torch.randn(1, 2)
    fast = pcr_fx.transform(model, x, in_ops())
    made = fast.report.chains[0].plan
    tensors = plan.Tensors(x, [torch.randn(600, 2, 2), torch.randn(600, 2), *made.program.literals], [], are_stacked=True)
    timings = measure.measure(made._case(1), made.settings, tensors, needs_gradient=False)
    notes = {t.way: t.note for t in timings}
    assert notes["newton"] == notes["stacking operands"] == "out of memory"
    assert plan._fastest(made._case(1), timings, needs_gradient=False).leaves_alone(False)


def test_inference_tensors_are_measured() -> None:
    model = Net(50, 3).requires_grad_(False)
    with torch.inference_mode():
        x = torch.randn(4, 3)
    fast = pcr_fx.transform(model, torch.randn(4, 3), in_ops())
    torch.testing.assert_close(fast(x), model(x))
    assert chain_of(fast)["timings"]


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_collected_again_when_the_last_has_measured(collects: bool) -> None:
    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        with measure._uncollected:
            with measure._uncollected:
                assert not gc.isenabled()
            assert not gc.isenabled()
        assert gc.isenabled() is collects
    finally:
        (gc.enable if before else gc.disable)()


def test_what_is_measured_apart_does_not_keep_others_from_tracing() -> None:
    """A kernel that another thread builds holds a lock that the measurement waits for."""

    @apart
    def measured() -> bool:
        builder = threading.Thread(target=isolated(lambda: None), daemon=True)
        builder.start()
        builder.join(10)
        return not builder.is_alive()

    assert measured()


def test_threads_that_call_first_take_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a checkpoint finds a kernel that was not there when it went forward."""
    is_ready = ChainKernel.is_ready

    def slowly(*arguments: Any) -> bool:
        time.sleep(0.2)
        return is_ready(*arguments)

    monkeypatch.setattr(ChainKernel, "is_ready", slowly)
    fast = pcr_fx.transform(Net(30, 3), torch.randn(4, 3), {"solver": "sequential"})

    def step(index: int) -> Tensor:
        time.sleep(0.1 * index)
        x = torch.ones(4, 3).requires_grad_()
        torch.utils.checkpoint.checkpoint(fast, x, use_reentrant=False).sum().backward()
        return x.grad  # type: ignore[return-value]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(step, range(2))
    assert torch.equal(first, second)


def test_a_measurement_from_disk_is_called_one(cache: Path) -> None:
    x = torch.randn(4, 3)
    for found in (False, True):
        plan._plans.clear()
        fast = pcr_fx.transform(Net(40, 3), x, in_ops())
        with torch.no_grad():
            fast(x)
        assert chain_of(fast)["reason"].endswith("(by measurements kept on disk)") is found


def test_the_budget_bounds_what_measuring_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**9))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))  # each look at it a second later
    model, x = Net(40, 3), torch.randn(4, 3)
    fast = pcr_fx.transform(model, x, in_ops(planning_budget=3.0))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    notes = [t["note"] for t in chain_of(fast)["timings"]]
    assert any("the budget of 3 s was spent" in note for note in notes)


def test_a_plan_is_measured_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, calls = rigged(forward_eager=2.0, forward_sequential=1.0)
    monkeypatch.setattr(plan, "measure", measured)
    fast, x = pcr_fx.transform(Net(20, 3), torch.randn(4, 3), in_ops()), torch.randn(4, 3)

    def call(_: int) -> Tensor:
        with torch.no_grad():
            return fast(x)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(call, range(8)))
    assert len(calls) == 1 and all(torch.equal(result, results[0]) for result in results)


def test_what_is_asked_for_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "measure", None)
    x = torch.randn(4, 3)
    fast = pcr_fx.transform(Net(20, 3), x, in_ops(solver="picard"))
    fast(x)
    assert chain_of(fast)["reason"].startswith('asked for with solver="picard"')


@pytest.mark.parametrize("through", ["transform", "torch.compile"])
def test_an_empty_batch_is_not_timed(through: str) -> None:
    model, x = Net(20, 3), torch.zeros(0, 3)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="deeppcr", options={"inner_backend": "eager"})
    fast = pcr_fx.transform(model) if through == "transform" else compiled
    for batch in (torch.randn(7, 3), x, torch.randn(7, 3)):
        torch.testing.assert_close(fast(batch), model(batch))
    assert pcr_fx.solve_chain(lambda z, w, _: torch.tanh(z @ w), x, torch.randn(20, 3, 3)).final.shape == (0, 3)


@pytest.mark.parametrize("options", [{}, {"kernels": False}, {"planning": "estimated"}, {"solver": "newton"}])
def test_a_checkpoint_computes_again_what_it_computed(options: dict[str, Any]) -> None:
    """From the first call on: what is saved for the backward may not depend on what was learned meanwhile."""
    model = Net(20, 3)
    fast = pcr_fx.transform(model, options=options)
    for batch in (7, 7, 1, 20):
        x = torch.randn(batch, 3)
        torch.utils.checkpoint.checkpoint(fast, x.requires_grad_(), use_reentrant=False).sum().backward()
        expected = torch.autograd.grad(model(x).sum(), x)[0]
        torch.testing.assert_close(x.grad, expected, atol=1e-5, rtol=1e-5)


def test_a_chain_left_alone_has_a_report_that_says_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, _ = rigged(forward_eager=1.0, forward_sequential=2.0, backward_eager=1.0, backward_newton=2.0)
    monkeypatch.setattr(plan, "measure", measured)
    torch._dynamo.reset()
    fast = torch.compile(Net(20, 3), backend="deeppcr", options=in_ops(inner_backend="eager"))
    fast(torch.randn(4, 3)).sum().backward()
    compiled = pcr_fx.report()
    transformed = pcr_fx.transform(Net(20, 3), options=in_ops())
    with torch.no_grad():
        transformed(torch.randn(4, 3))
    for report in (compiled, transformed.report):
        (chain,) = report.to_dict()["chains"]
        assert chain["left_alone"] and chain["extra_memory_bytes"] == 0
        assert "forward the model's own ops, backward the model's own ops" in str(report)


def test_what_comes_on_top_of_a_way_counts() -> None:
    """Ways in PyTorch's ops stack the blocks' parameters first; native code both ways does not."""

    def chosen(**more: float) -> pcr_fx.planner.Choice:
        seconds = {
            ("forward", "eager"): 4.0, ("forward", "sequential (native kernel)"): 2.0, ("forward", "sequential"): 1.5,
            ("backward", "eager"): 4.0, ("backward", "sequential (native kernel)"): 2.0, ("backward", "newton"): 1.5,
        }  # fmt: skip
        seconds |= {(direction, way.replace("_", " ")): s for way, s in more.items() for direction in ("forward", "backward")}
        timings = [plan.Timing(way, direction, s) for (direction, way), s in seconds.items()]
        fast = pcr_fx.transform(Net(20, 3), torch.randn(4, 3), {"planning": "estimated"})
        made = fast.report.chains[0].plan
        assert made is not None
        return plan._fastest(made._case(4), timings, needs_gradient=True)

    assert [way.name for way in (chosen().forward, chosen().backward)] == ["sequential", "newton"]
    assert chosen(stacking_operands=2.0).is_native(True)
    assert not chosen(stacking_operands=2.0).leaves_alone(True)
    assert chosen(stacking_operands=2.0, handing_out_gradients=4.0).leaves_alone(True)


def test_two_that_are_close_are_timed_again_in_turn() -> None:
    model, x = Net(40, 3), torch.randn(4, 3)
    fast = pcr_fx.transform(model, options=in_ops(planning="estimated"))
    fast(x)
    made = fast.report.chains[0].plan
    assert made is not None
    operands = [torch.randn(40, 3, 3), torch.randn(40, 3)]
    tensors = plan.Tensors(x, [*operands, *made.program.literals], [])
    match = measure._Measurement(made._case(4), made.settings, tensors, needs_gradient=False, with_eager=True)
    calls: list[str] = []
    for way, seconds in (("eager", 1.0), ("sequential", 1.1), ("newton", 3.0)):
        match.timings.append(plan.Timing(way, "forward", seconds))
        match.runs[way, "forward"] = measure._Run(lambda way=way: calls.append(way), 1.0, 0.0)
    match._rematch()
    assert calls == ["eager", "eager", "sequential", "sequential"] * (len(calls) // 4) and calls
    assert [t.seconds for t in match.timings][2] == 3.0 and all(t.seconds < 0.5 for t in match.timings[:2])


def test_a_checkpoint_keeps_its_way_where_a_chain_drifts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "measure", rigged(forward_eager=2.0, forward_newton=1.0, backward_newton=1.0)[0])
    fast, x = pcr_fx.transform(Net(30, 3), options=in_ops()), torch.randn(4, 3)
    checkpoint = torch.utils.checkpoint.checkpoint
    checkpoint(fast, x.clone().requires_grad_(), use_reentrant=False).sum().backward()
    assert chain_of(fast)["solver_forward"] == "newton"
    with torch.no_grad():
        for layer in fast.get_submodule("layers"):
            layer.weight.mul_(60.0)
    measured, _ = rigged(forward_eager=1.0, forward_newton=9.0, backward_newton=9.0, backward_eager=1.0)
    monkeypatch.setattr(plan, "measure", measured)
    for _ in range(3):
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        checkpoint(fast, ours, use_reentrant=False).sum().backward()
        model_with(fast, theirs).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-3, rtol=1e-3)
