"""The planner that measures: what it chooses, when it looks again, and when it leaves a chain alone."""

import copy
import gc
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from planner_cases import Net, chain_of, in_ops, rigged
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import pcr_fx
from pcr_fx import ways
from pcr_fx.body.isolation import apart, isolated
from pcr_fx.planner import Plan, measure, plan
from pcr_fx.planner.fastest import fastest_ways
from pcr_fx.targets import CppKernel

pytestmark = pytest.mark.usefixtures("plan_cache")
DIRECTIONS = ("forward", "backward")


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
    assert all(seconds.pop(("backward", name)) for name in ("Adam", "Adam, fused"))  # which no way takes part in
    best = {d: min((s, way) for (of, way), s in seconds.items() if of == d) for d in DIRECTIONS}
    assert chain["left_alone"] == (0.95 * eager <= sum(least for least, _ in best.values()) + beside)
    if not chain["left_alone"]:
        assert all(chain[f"solver_{direction}"] == best[direction][1] for direction in DIRECTIONS)
    # Every way is either timed or has its reason.
    assert {t["way"] for t in chain["timings"]} >= {"eager", "sequential", "newton", "picard", "jacobi"}
    assert all(t["seconds"] is not None or t["note"] for t in chain["timings"])
    assert "fastest of what was measured" in chain["reason"]


def test_the_report_says_where_a_training_step_goes() -> None:
    seen: list[object] = []
    handle = register_optimizer_step_post_hook(lambda *args: seen.append(args))
    model, x = Net(100, 3), torch.randn(4, 3)
    before = copy.deepcopy(model.state_dict())
    try:
        fast = pcr_fx.transform(model, x)
        fast(x)
    finally:
        handle.remove()
    assert not seen  # others' hooks are for their own optimizers
    torch.testing.assert_close(model.state_dict(), before)
    chain = chain_of(fast)
    parameters = len({name for name, _ in model.named_parameters() if name.startswith("layers")})
    assert chain["own_parameters"] == parameters > 0
    step = chain["training_step"]
    assert step.keys() == {*DIRECTIONS, "handing_out", "adam", "adam_fused"} and all(s > 0 for s in step.values())
    text = " ".join(str(fast.report).replace("|", " ").split())
    assert f"{parameters} parameters, in a training step: handing out their gradients" in text
    assert "with fused=True). Packed, they are few: transform(model, x, pack_parameters=True," in text
    packed = pcr_fx.transform(model, x, pack_parameters=True)
    packed(x)
    assert chain_of(packed)["own_parameters"] == 0 and "beside it" not in str(packed.report)
    model.layers[5].weight.requires_grad_(False)
    some_packed = pcr_fx.transform(model, x, pack_parameters=True)
    some_packed(x)
    left = chain_of(some_packed)["training_step"]
    assert 0 < left["adam"] < step["adam"] * 3 and "Packed, they are few" not in str(some_packed.report)


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


def test_a_kernel_is_refused_where_its_lanes_are_features_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcr_fx.ways.native.KERNEL_OPERATIONS_MEASURED", 1)
    monkeypatch.setattr("pcr_fx.targets.cpp.kernel._VECTOR_GRADIENTS", 0)
    x = torch.randn(16, 3)
    planned = pcr_fx.transform(Net(20, 3), x, {"planning": "estimated"}).report.chains[0].plan

    def refused(samples: int, direction: str) -> str | None:
        none = ways.candidates(planned._case(samples), direction)[1]
        return next((each.reason for each in none if each.name == "sequential (native kernel)"), None)

    assert refused(16, "forward") is None
    assert "gradients are too large" in (refused(16, "backward") or "")
    assert "fewer than" in (refused(1, "forward") or "")


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

    model, x = Net(600, 2), torch.randn(1, 2)
    fast = pcr_fx.transform(model, x, in_ops())
    made = fast.report.chains[0].plan
    assert not made.program.fault("evaluate", "linearise", "pullback")
    monkeypatch.setattr("pcr_fx.ways.iterative.solve_iteratively", exhausted)
    monkeypatch.setattr(torch, "stack", exhausted)
    call = made.program.call_with(x, [torch.randn(600, 2, 2), torch.randn(600, 2)], [])
    timings = measure.measure(made._case(1), made.settings, call, needs_gradient=False, are_stacked=True)
    notes = {t.way: t.note for t in timings}
    assert notes["newton"] == notes["stacking operands"] == "out of memory"
    assert fastest_ways(made._case(1), timings, needs_gradient=False).leaves_alone(False)


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
    is_ready = CppKernel.is_ready

    def slowly(*arguments: Any) -> bool:
        time.sleep(0.2)
        return is_ready(*arguments)

    monkeypatch.setattr(CppKernel, "is_ready", slowly)
    fast = pcr_fx.transform(Net(30, 3), torch.randn(4, 3), {"solver": "sequential"})

    def step(index: int) -> Tensor:
        time.sleep(0.1 * index)
        x = torch.ones(4, 3).requires_grad_()
        torch.utils.checkpoint.checkpoint(fast, x, use_reentrant=False).sum().backward()
        return x.grad  # type: ignore[return-value]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(step, range(2))
    assert torch.equal(first, second)


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
        seconds |= {
            (direction, way.replace("_", " ")): s for way, s in more.items() for direction in ("forward", "backward")
        }
        timings = [plan.Timing(way, direction, s) for (direction, way), s in seconds.items()]
        fast = pcr_fx.transform(Net(20, 3), torch.randn(4, 3), {"planning": "estimated"})
        made = fast.report.chains[0].plan
        assert made is not None
        return fastest_ways(made._case(4), timings, needs_gradient=True)

    assert [way.name for way in (chosen().forward, chosen().backward)] == ["sequential", "newton"]
    assert chosen(stacking_operands=2.0).is_in_place(True)
    assert not chosen(stacking_operands=2.0).leaves_alone(True)
    assert chosen(stacking_operands=2.0, handing_out_gradients=4.0).leaves_alone(True)


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


def test_calls_under_autocast_go_where_a_later_measurement_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "measure", rigged(forward_eager=1.0, forward_newton=2.0)[0])
    fast, x = pcr_fx.transform(Net(400, 3), options=in_ops()), torch.randn(4, 3)
    with torch.no_grad():
        for autocast, left_alone in ((True, False), (False, True), (True, True)):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                fast(x)
            assert chain_of(fast)["left_alone"] is left_alone
