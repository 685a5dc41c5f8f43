"""What the checker of lowered functions finds."""

import sys
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pcr_fx.body.tracer import trace
from pcr_fx.codegen import lower
from pcr_fx.codegen.check import MalformedFunction, check
from pcr_fx.codegen.ir import Apply, Buffer, Constant, Function, Load, Loop, View
from pcr_fx.codegen.simplify import restricted

IN, SHARED, LOCAL, OUT = Buffer("in0", 6, True), Buffer("in1", 6, False), Buffer("t1", 2, True), Buffer("out0", 2, True)
ROWS = Load(View(IN, (3, 1)))
SUM = Loop(View(LOCAL, (1,)), (2,), Apply("mul", (ROWS, Load(View(SHARED, (3, 1))))), (3,), "add")
COPY = Loop(View(OUT, (1,)), (2,), Apply("tanh", (Load(View(LOCAL, (1,))),)))
GOOD = Function((IN, SHARED), (OUT,), (SUM, COPY))


def test_a_function_that_keeps_the_rules() -> None:
    check(GOOD)
    total = replace(OUT, varying=False)
    check(Function((IN, SHARED), (total,), (SUM, replace(COPY, out=View(total, (1,))))))


BAD = {
    "strides": (replace(SUM, reduced=(), combine=None), COPY),
    "leaves its 6 numbers": (replace(SUM, shape=(3,)), COPY),
    "leaves its 2 numbers": (SUM, replace(COPY, value=Load(View(LOCAL, (-1,))))),
    "combines by None": (replace(SUM, combine=None), COPY),
    "combines by mul": (replace(SUM, combine="mul"), COPY),
    "no function erfi": (SUM, replace(COPY, value=Apply("erfi", (Constant(1.0),)))),
    "tanh takes 1 arguments": (SUM, replace(COPY, value=Apply("tanh", (Constant(1.0), Constant(1.0))))),
    "reads t1 before that is written": (COPY, SUM),
    "reads what it writes": (SUM, COPY, replace(COPY, value=Load(View(OUT, (1,))))),
    "writes to an input": (SUM, COPY, replace(COPY, out=View(IN, (1,)))),
    "more than once to a number": (SUM, replace(COPY, out=View(OUT, (0,)))),
    "not written once, but .0, 0.": (SUM,),
    "not written once, but .2, 2.": (SUM, COPY, COPY),
    "not written once, but .1, 0.": (SUM, replace(COPY, shape=(1,))),
    "all samples share it": (replace(SUM, out=View(replace(LOCAL, varying=False), (1,))),),
    "two buffers have one name": (SUM, replace(COPY, value=Load(View(replace(LOCAL, size=3), (1,))))),
}


@pytest.mark.parametrize("message", BAD)
def test_a_function_that_does_not(message: str) -> None:
    with pytest.raises(MalformedFunction, match=message):
        check(replace(GOOD, loops=BAD[message]))


def test_what_is_lowered_or_restricted_is_checked_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Function] = []
    for module in ("lower", "simplify"):  # the package has a function `lower` in place of the module
        monkeypatch.setattr(sys.modules[f"pcr_fx.codegen.{module}"], "check", checked.append)
    with FakeTensorMode():
        graph = trace(lambda x: (torch.tanh(x), x + 1), [torch.empty(2, 3)])
    both = lower(graph.graph, graph, [True], [False, False])
    part = restricted(both, both.outputs[:1])
    assert checked == [both, part]
    monkeypatch.setenv("PCR_FX_CHECK", "0")
    lower(graph.graph, graph, [True], [False, False])
    assert len(checked) == 2
