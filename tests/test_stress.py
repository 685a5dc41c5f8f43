"""A small part of what `python -m stress` does at length."""

import pytest
from stress import interrupts, threads

pytestmark = pytest.mark.usefixtures("kernel_cache")


@pytest.mark.parametrize("index", [0, 1, 3, 4])  # a call of each stage but compiling, which takes seconds
def test_a_call_after_an_interrupt_is_right(index: int) -> None:
    calls = interrupts.Calls(seed=0, unused=0, ways=["transform"])
    calls.typical = {(stage, "transform"): 0.5 for stage in interrupts.STAGES}
    assert calls.interrupt(index).trouble == ""


def test_calls_of_threads_beside_writers_are_right() -> None:
    assert threads.run(200) == []
