"""A sample of what `python -m tests.fuzz` looks at, the same in every run; and the fuzzer itself."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from fuzz import run
from fuzz.cases import Case, Line, draw, draw_body
from fuzz.run import Call, Verdict, draw_calls, judge
from fuzz.shrink import script, shrink

pytestmark = pytest.mark.usefixtures("kernel_cache")


@pytest.mark.parametrize("seed", range(40))
def test_models_drawn_at_random(seed: int) -> None:
    case = draw(seed)
    for call in draw_calls(case, kernels=0):
        verdict = judge(case, call)
        if verdict.kind not in ("right", "refused"):
            pytest.fail(script(case, call, verdict))


@pytest.mark.parametrize("seed", range(10))
def test_bodies_drawn_at_random(seed: int) -> None:
    case = draw_body(seed)
    for call in draw_calls(case, kernels=0):
        verdict = judge(case, call)
        if verdict.kind not in ("right", "refused"):
            pytest.fail(script(case, call, verdict))


TRANSPOSED = "{}.transpose(0, -1).contiguous().transpose(0, -1)"
FOUND: dict[str, tuple[Case, Call]] = {
    "a view of what lies otherwise than in the trace": (
        replace(
            draw(100029),
            lines=(
                Line("v2", "{0}.transpose(0, -1).contiguous().tanh().transpose(0, -1)", ("y",), "r"),
                Line("v3", "torch.rsub({0}, {1}, alpha=0.5)", ("z", "z1"), "r"),
                Line("v4", "torch.slice_scatter({0}, {1}[..., 1:3], -1, 2, 4)", ("v2", "v2"), "r"),
            ),
            second="v3",
            length=2,
            batch=2,
            shape="4",
            strides=(TRANSPOSED, "{}"),
            tapped=(),
        ),
        Call("transform", "newton"),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_once(name: str) -> None:
    verdict = judge(*FOUND[name])
    assert verdict.kind == "right", verdict.words
    assert verdict.chains


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every sine is wrong where it is interpreted."""
    from pcr_fx.codegen.functions import FUNCTIONS

    monkeypatch.setitem(FUNCTIONS, "sin", replace(FUNCTIONS["sin"], twin=lambda x: 1.01 * torch.sin(x)))
    yield


@pytest.mark.usefixtures("broken")
def test_what_is_wrong_is_found_and_cut_down() -> None:
    line = Line("v1", "torch.sin({0})", ("v0",), "r")
    others = [Line("v0", "{0} @ a", ("z",), "r"), Line("v2", "{0} + {1}", ("v1", "y"), "r")]
    case = replace(
        draw(0),
        lines=(others[0], line, others[1]),
        shape="4",
        length=8,
        batch=3,
        dtype="float64",
        second="y",
        strides=("{}", "{}"),
    )
    call = Call("transform", "interpreted")
    verdict = judge(case, call)
    assert verdict.kind == "wrong"
    small = shrink(case, call, verdict)
    assert [line.template for line in small.lines] == ["torch.sin({0})"]
    assert (small.length, small.batch) == (2, 1)
    text = script(small, call, verdict)
    assert text.startswith("# wrong: result 0 is")
    with pytest.raises(AssertionError, match="not close"), run.interpreted():
        exec(compile(text, "<script>", "exec"), {})


def test_a_call_that_eager_refuses_is_no_case() -> None:
    case: Case = replace(draw(0), lines=(Line("v0", "torch.no_such_function({0})", ("z",), "r"),))
    assert judge(case, Call("transform", "newton")) == Verdict(
        "refused", judge(case, Call("transform", "newton")).words
    )
