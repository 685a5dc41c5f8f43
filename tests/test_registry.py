"""What is made for models does not outlive them for ever."""

import gc
import weakref

import pytest
import torch
from planner_cases import Net
from torch import Tensor, fx

import pcr_fx
from pcr_fx import backend
from pcr_fx.body import program
from pcr_fx.chain import Chain
from pcr_fx.looks import signature_of
from pcr_fx.planner import Plan, make_plan, plan
from pcr_fx.registry import KEPT, Registry


class _Value:
    pass


def test_values_that_are_held_stay_and_of_others_the_latest() -> None:
    registry: Registry[int, _Value] = Registry(kept=2)
    held = registry.keep(0, _Value())
    for key in (1, 2, 3):
        registry.keep(key, _Value())
    gc.collect()
    assert registry.get(0) is held and registry.get(1) is None
    assert registry.get(3) is not None and len(registry) == 2  # which let go of 2, since 0 and 3 were used later


def test_the_first_value_of_a_key_wins() -> None:
    registry: Registry[int, _Value] = Registry()
    first = registry.keep(0, _Value())
    assert registry.keep(0, _Value()) is first and registry.keys() == [0]


def _planned(factor: float) -> Plan:
    class Block(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (factor * x,)

    chain = Chain(fx.symbolic_trace(Block()), 2)
    return make_plan(chain, signature_of([torch.ones(1)], [], []), pcr_fx.Options(kernels=False))


def test_what_is_kept_is_bounded() -> None:
    registry: Registry[int, _Value] = Registry()
    for key in range(500):
        registry.keep(key, _Value())
    gc.collect()
    assert len(registry) == KEPT and registry.get(499) is not None and registry.get(0) is None


def test_chains_that_are_gone_do_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((plan, "_plans"), (program, "_programs"), (program, "_of_block")):
        monkeypatch.setattr(module, name, Registry(kept=2))
    made = [weakref.ref(_planned(1 + index / 100)) for index in range(8)]
    gc.collect()
    assert [one() is None for one in made] == [True] * 6 + [False] * 2
    assert len(plan._plans) == len(program._programs) == len(program._of_block) == 2


def test_a_copy_for_other_sizes_holds_what_it_is_a_copy_of() -> None:
    first = _planned(2.0)
    copy, key = first.called_with(signature_of([torch.ones(3)], [], [])), first.key
    del first
    plan._plans._latest.clear()
    gc.collect()
    assert plan._plans.get(key) is copy.origin


def test_a_plan_of_another_length_is_held_by_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_plans", Registry(kept=1))
    first = _planned(2.0)
    longer = first.for_chain(first.program.chain.of_length(5))
    copy, key = longer.called_with(signature_of([torch.ones(3)], [], [])), longer.key
    del longer
    _planned(3.0)
    gc.collect()
    assert plan._plans.get(key) is copy.origin


def test_what_was_compiled_holds_its_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_plans", Registry(kept=1))
    options = {"solver": "newton", "kernels": False, "inner_backend": "aot_eager", "min_length": 8}
    model, x = Net(8, 2), torch.randn(3, 2)
    compiled = torch.compile(model, backend="deeppcr", options=options)
    expected = compiled(x).detach()
    key = plan._plans.keys()[-1]
    # What is told of the latest model holds its nodes.
    monkeypatch.setattr(backend._latest, "functions", {})
    monkeypatch.setattr(backend._latest, "_compiling", None)
    _planned(3.0)
    gc.collect()
    assert plan._plans.get(key) is not None
    assert torch.equal(compiled(x), expected)


def test_a_plan_that_is_gone_is_told_of() -> None:
    with pytest.raises(pcr_fx.PlanError, match="compile it again"):
        plan.plan_by_key("of another day")
