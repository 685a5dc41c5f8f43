"""In which manner outputs are computed: the one that takes the least time on a call's tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_outputs import Loop, inputs, readout, results

import pcr_fx
from pcr_fx import manners, node
from pcr_fx.manners import Manner
from pcr_fx.planner import Timing, plan

NAMES = {"_swept": Manner.SWEPT, "computed_behind": Manner.BEHIND, "as_written": Manner.AS_WRITTEN}


def name_of(run: Any) -> str:
    return getattr(run, "func", run).__name__


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[Manner, float]:
    """The seconds of each manner, which is called all the same; and of the ways, by which native code is chosen."""
    taken: dict[Manner, float] = {}
    seconds = manners._seconds

    def rigged(run: Any, given: Any) -> float:
        assert seconds(run, given) > 0
        return taken[NAMES[name_of(run)]]

    kernel = "sequential (native kernel)"
    timings = [Timing(way, d, s) for way, s in (("eager", 1.0), (kernel, 0.1)) for d in ("forward", "backward")]
    monkeypatch.setattr(plan, "measure", lambda *_: tuple(timings))
    monkeypatch.setattr(manners, "_seconds", rigged)
    monkeypatch.setattr(node, "HEAVY", 0)
    return taken


@pytest.mark.usefixtures("plan_cache")
@pytest.mark.parametrize("fastest", Manner)
def test_the_manner_that_takes_the_least_time(fastest: Manner, timed: dict[Manner, float]) -> None:
    timed |= {manner: 3.0 for manner in Manner} | {fastest: 2.5}
    model, given = Loop(readout), inputs()
    fast = pcr_fx.transform(model, given)
    assert [entry.chain.length for entry in fast.report.chains] == [12]
    gradients = []
    handle = model.weight.register_hook(gradients.append)
    for ours, theirs in zip(results(fast, model, given), results(model, model, given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    handle.remove()
    assert len(gradients) == 2  # of this call, and of the model's own: those that were timed are nobody's
    with torch.no_grad():
        torch.testing.assert_close(fast(*given), model(*given), rtol=1e-12, atol=1e-12)
    solve = next(m for m in fast._pcr_variants[0].run.modules() if isinstance(m, node.SolveNode))
    found = list(solve._sweeps._found.values())
    assert len(found) == 2  # with gradients and without
    assert all((one if isinstance(one, Manner) else Manner.SWEPT) is fastest for one in found)


@pytest.mark.usefixtures("plan_cache")
def test_the_models_own_ops_are_only_tried_where_they_may_be_faster(timed: dict[Manner, float]) -> None:
    timed |= {Manner.SWEPT: 1.5, Manner.BEHIND: 0.7}  # a training call of its own ops was measured to take 2 s
    model, given = Loop(readout), inputs()
    fast = pcr_fx.transform(model, given)
    for ours, theirs in zip(results(fast, model, given), results(model, model, given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
