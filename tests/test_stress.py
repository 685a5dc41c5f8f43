"""A small part of what `python -m stress` does at length."""

import pytest
from stress import interrupts, processes, threads

pytestmark = pytest.mark.usefixtures("kernel_cache")


def test_calls_after_interrupts_are_right() -> None:
    assert interrupts.run(10, seed=0) == []


def test_calls_of_threads_beside_writers_are_right() -> None:
    assert threads.run(1000) == []


def test_processes_at_a_first_call() -> None:
    assert processes.at_once(3) == []


def test_killed_processes_leave_nothing_broken() -> None:
    assert processes.killed(2, seed=0) == []
