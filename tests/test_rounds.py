"""Timing beside others: rounds, minima, two sizes and a line, what counts as disturbed; and the watch at run time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from planner_cases import Net, in_ops

import pcr_fx
from pcr_fx.planner import measure, plan, rounds
from pcr_fx.planner.rounds import Entrant, Series, along, compete, least_in_turn
from pcr_fx.planner.watch import BETWEEN, CALLS, Watch
from pcr_fx.targets.cpp import threads

LENGTH = 64


class Clock:
    """Time that only what is timed takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(rounds.time, "perf_counter", lambda: self.now)

    def entrant(self, name: str, seconds: Callable[[int, int], float], **more: Any) -> Entrant:
        """Whose call number n of so many blocks takes `seconds(blocks, n)`."""
        calls = [0]

        def make(count: int) -> Callable[[], dict[Any, float]]:
            def call() -> dict[Any, float]:
                calls[0] += 1
                taken = seconds(count, calls[0])
                self.now += taken
                return {name: taken}

            return call

        return Entrant(make, {name: Series(LENGTH)}, **more)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def race(*entrants: Entrant, seconds: float = 1e6, share: float = 1e6) -> None:
    for entrant in entrants:
        entrant.grow(1, share, rounds.time.perf_counter() + seconds)
    compete(entrants, lambda name: "first", rounds.time.perf_counter() + seconds)


def series_of(entrant: Entrant) -> Series:
    (series,) = entrant.series.values()
    return series


def test_the_least_counts_whatever_else_the_machine_did(clock: Clock) -> None:
    """Stalled in two calls of three, as a team of threads is, and a hundredfold."""
    stalled = clock.entrant("stalled", lambda blocks, n: 0.03 * blocks * (1 if n % 3 == 0 else 100), is_shared=True)
    steady = clock.entrant("steady", lambda blocks, n: 0.04 * blocks)
    race(stalled, steady)
    assert series_of(stalled).seconds == pytest.approx(0.03 * LENGTH)
    assert series_of(stalled).is_disturbed and not series_of(steady).is_disturbed


def test_what_is_too_long_is_timed_at_two_sizes_and_a_line_goes_through_them(clock: Clock) -> None:
    """A fixed part is not multiplied by the number of blocks."""
    entrant = clock.entrant("long", lambda blocks, n: 0.5 + 0.1 * blocks)
    race(entrant, share=3.0)
    assert series_of(entrant).sizes == [4, 16]
    assert series_of(entrant).seconds == pytest.approx(0.5 + 0.1 * LENGTH)
    assert along([(4, 2.0), (16, 1.0)], 64) == pytest.approx(4.0)  # a line that falls is no line


def test_where_long_calls_are_stalled_short_ones_tell(clock: Clock) -> None:
    entrant = clock.entrant("long", lambda blocks, n: 0.1 * blocks * (1 if blocks < 10 else 5 + n))
    race(entrant, share=30.0)
    assert series_of(entrant).seconds == pytest.approx(0.1 * LENGTH) and series_of(entrant).is_disturbed
    assert along(series_of(entrant).points, LENGTH) == pytest.approx(series_of(entrant).seconds)


def test_who_is_far_behind_is_called_no_more(clock: Clock) -> None:
    best, near, far = (clock.entrant(str(seconds), lambda *_, s=seconds: s) for seconds in (1.0, 1.2, 9.0))
    race(best, near, far)
    assert far.is_out and not best.is_out and not near.is_out
    assert len(series_of(far).times[LENGTH]) < len(series_of(best).times[LENGTH])


def test_who_has_no_rival_left_is_called_no_more(clock: Clock) -> None:
    best, far = clock.entrant("best", lambda *_: 1.0), clock.entrant("far", lambda *_: 90.0)
    race(best, far)
    assert far.is_out and len(series_of(best).times[LENGTH]) < rounds.FEWEST_ROUNDS


def test_what_is_beyond_the_bar_is_out_though_it_was_not_steady(clock: Clock) -> None:
    entrants = [clock.entrant("best", lambda *_: 1.0), clock.entrant("loose", lambda _, n: 2.5 + (n % 2))]
    for entrant in entrants:
        entrant.grow(1, 1e6, 1e6)
    compete(entrants, lambda name: "first", 1e6, lambda: 2.0)
    assert entrants[1].is_out


def test_who_may_have_been_disturbed_is_called_on(clock: Clock) -> None:
    first, late = (
        clock.entrant("first", lambda *_: 1.0),
        clock.entrant("late", lambda _, n: 90.0 + n if n < 12 else 0.5, is_shared=True),
    )
    race(first, late)
    assert series_of(late).seconds == 0.5


def test_nothing_begins_that_would_not_end_in_time(clock: Clock) -> None:
    short, long = clock.entrant("short", lambda *_: 1.0), clock.entrant("long", lambda *_: 2.9)
    race(short, long, seconds=10.0)
    ends = 3 * (1.0 + 2.9) + 10.0
    assert clock.now <= ends


def test_a_watch_looks_at_the_least_of_some_calls_now_and_then() -> None:
    watch = Watch(1.0)
    timed = [watch.ended(1.9) for _ in range(CALLS) if watch.begins()]
    assert len(timed) == CALLS and not any(timed)
    assert sum(watch.begins() for _ in range(BETWEEN)) == 0
    off = [watch.ended(2.5) for _ in range(CALLS) if watch.begins()]
    assert off.index(True) == len(off) - 1
    for seconds, is_off in ((0.4, True), (0.6, False), (2.1, True)):
        watch = Watch(1.0)
        assert [watch.ended(seconds) for _ in range(CALLS) if watch.begins()][-1] is is_off
    # One call that is as it should be is enough, and other numbers of samples may take as many times longer.
    watch = Watch(1.0)
    assert not any([watch.ended(50.0 if n else 1.0) for n in range(CALLS) if watch.begins()])
    watch = Watch(1.0, share=1.8)
    assert not any([watch.ended(3.5) for _ in range(CALLS) if watch.begins()])
    # What does more than was measured may take longer, but not less, and what was measured on a busy machine is out.
    for expected, seconds, is_off in ((1.0, 9.0, False), (1.0, 0.4, True), (0.0, 9.0, True)):
        watch = Watch(expected)
        assert [watch.ended(seconds, has_more=True) for _ in range(CALLS) if watch.begins()][-1] is is_off


def test_calls_that_take_another_time_than_was_measured_are_measured_anew(
    monkeypatch: pytest.MonkeyPatch, plan_cache: Any
) -> None:
    def planted(case: Any, settings: Any, call: Any, *_: Any) -> Any:
        ways = ("eager", 1e-9), ("sequential", 1e3), ("newton", 1e3)
        return tuple(plan.Timing(way, "forward", seconds, points=((30, seconds),)) for way, seconds in ways)

    monkeypatch.setattr(plan, "measure", planted)
    model, x = Net(30, 3), torch.randn(4, 3)
    fast = pcr_fx.transform(model, options=in_ops())
    calls: list[Any] = []
    with torch.no_grad():
        fast(x)
        monkeypatch.setattr(plan, "measure", lambda *given: calls.append(given) or measure.measure(*given))
        for _ in range(2 * CALLS):
            torch.testing.assert_close(fast(x), model(x))
    assert len(calls) == 1


def test_no_round_begins_behind_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls = {
        name: clock.entrant(name, lambda _, n, step=step: step / n).make(LENGTH) for name, step in (("a", 4), ("b", 2))
    }
    timed = {name: lambda name=name: calls[name]()[name] for name in calls}
    assert least_in_turn(timed, 3, 100.0) == {"a": 4 / 3, "b": 2 / 3}
    assert least_in_turn(timed, 3, 1e-3) == {"a": 4 / 4, "b": 2 / 4}  # one in any case


@pytest.mark.parametrize("factor", [200.0, 0.005])
def test_a_wrong_plan_on_disk_is_found_out_and_replaced(factor: float, plan_cache: Any) -> None:
    model, x = Net(30, 3), torch.randn(4, 3)

    def planned() -> str:
        plan._plans.clear()
        fast = pcr_fx.transform(model, options=in_ops(planning_budget=0.5))
        with torch.no_grad():
            fast(x)
        return fast.report.to_dict()["chains"][0]["reason"]

    planned()
    if not pcr_fx.cached_plans():
        pytest.skip("the machine is too busy for measurements that are kept")
    (kept,) = pcr_fx.cached_plans()
    timings = [plan.Timing(**{**t, "points": tuple(map(tuple, t["points"]))}) for t in kept["timings"]]
    wrong = [
        plan.replace(t, seconds=t.seconds * factor, points=tuple((n, s * factor) for n, s in t.points))
        if t.way == "eager" and t.seconds
        else t
        for t in timings
    ]
    plan.store_timings(kept["key"], kept["chain"], wrong)
    assert not planned().endswith("(by measurements kept on disk)")
    for now in pcr_fx.cached_plans():
        eager = next(t for t in now["timings"] if t["way"] == "eager")
        before = next(t for t in timings if t.way == "eager")
        assert before.seconds is not None and 0.1 < eager["seconds"] / before.seconds < 10


def test_what_was_disturbed_is_not_kept(monkeypatch: pytest.MonkeyPatch, plan_cache: Any) -> None:
    def busy(*_: Any) -> Any:
        return tuple(
            plan.Timing(way, "forward", seconds, points=((30, seconds),), disturbed=way == "eager")
            for way, seconds in (("eager", 2.0), ("sequential", 1.0), ("newton", 9.0))
        )

    monkeypatch.setattr(plan, "measure", busy)
    fast, x = pcr_fx.transform(Net(30, 3), options=in_ops()), torch.randn(4, 3)
    with torch.no_grad():
        fast(x)
    assert not pcr_fx.cached_plans()
    assert "on a busy machine" in fast.report.to_dict()["chains"][0]["reason"]


def test_a_team_that_was_stalled_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    now, machine = [0.0], threads._Machine()
    monkeypatch.setattr(threads, "_machine", machine)
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now[0])
    team, pauses = threads.Team(), []

    def call(seconds: float) -> bool:
        is_shared = team.may_share("adjoint")
        team.call(lambda: now.__setitem__(0, now[0] + seconds), "adjoint", is_shared)
        return is_shared

    now[0] = 1.0
    assert not call(0.002)  # what one thread takes is found first
    assert call(0.001) and call(0.0011) and call(0.001)
    for _ in range(8):
        assert call(0.05)
        assert not call(0.002)
        with threads.insisting():
            assert team.may_share("adjoint")
        pauses.append(machine.until - now[0])
        now[0] = machine.until + 1e-6
    assert pauses[0] < pauses[1] < pauses[2] and pauses[-1] == pytest.approx(threads._LONGEST_PAUSE, rel=0.01)
    for _ in range(8):
        assert call(0.001)
    call(0.05)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert team.may_share("adjoint")
    assert machine.until - now[0] < 2 * threads._SHORTEST_PAUSE
