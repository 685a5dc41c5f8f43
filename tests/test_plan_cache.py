"""Measurements that are kept on disk: when they are made, read, shown, shared and made anew."""

import json
import logging
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from planner_cases import CHAIN, TIMING, Net, chain_of, in_ops, rigged

import pcr_fx
from pcr_fx.__main__ import main
from pcr_fx.planner import cache, plan

pytestmark = pytest.mark.usefixtures("plan_cache")


def test_measured_once_for_a_size_and_kept_on_disk(plan_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, calls = rigged(forward_eager=2.0, forward_sequential=1.0)
    monkeypatch.setattr(plan, "measure", measured)
    model = Net(20, 3)
    fast = pcr_fx.transform(model, options=in_ops())
    with torch.no_grad():
        for batch in (5, 6, 7, 5, 17, 16):  # as many bits of samples are one size
            x = torch.randn(batch, 3)
            torch.testing.assert_close(fast(x), model(x))
    assert len(calls) == len(list(plan_cache.glob("*.json"))) == 2
    # Another process starts with nothing in memory.
    plan._plans.clear()
    again = pcr_fx.transform(model, options=in_ops())
    with torch.no_grad():
        again(torch.randn(6, 3))
    assert len(calls) == 2
    assert chain_of(again)["timings"] == chain_of(fast)["timings"]
    # One of another version of the package may not be as fast.
    monkeypatch.setattr(cache, "_code", lambda: "another version")
    plan._plans.clear()
    with torch.no_grad():
        pcr_fx.transform(model, options=in_ops())(torch.randn(6, 3))
    assert len(calls) == 3


def test_samples_that_other_native_code_serves_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, calls = rigged(forward_eager=2.0, forward_sequential=1.0)
    monkeypatch.setattr(plan, "measure", measured)
    monkeypatch.setattr("pcr_fx.targets.cpp.kernel._VECTOR_SAMPLES", {lanes: 6 for lanes in (2, 4, 8, 16)})
    fast = pcr_fx.transform(Net(21, 3))
    with torch.no_grad():
        for batch in (4, 5, 6, 7):
            fast(torch.randn(batch, 3))
    assert len(calls) == 2


def test_options_turn_the_cache_and_the_measuring_off(plan_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, calls = rigged(forward_eager=2.0, forward_sequential=1.0)
    monkeypatch.setattr(plan, "measure", measured)
    x = torch.randn(4, 3)
    with torch.no_grad():
        pcr_fx.transform(Net(20, 3), x, in_ops(plan_cache=False))(x)
        assert len(calls) == 1 and not plan_cache.exists()
        fast = pcr_fx.transform(Net(400, 3), x, in_ops(planning="estimated"))
        fast(x)
    assert len(calls) == 1 and not plan_cache.exists()
    assert chain_of(fast)["solver_forward"] == "newton" and chain_of(fast)["timings"] == []
    assert "auto takes Newton forward up to" in chain_of(fast)["reason"]


def test_kept_measurements_are_shown_and_cleared(plan_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    content: str, plan_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = Net(20, 3), torch.randn(4, 3)
    with torch.no_grad():
        pcr_fx.transform(model, x, in_ops())(x)
        (path,) = plan_cache.glob("*.json")
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
    assert caplog.text.count("is not a folder") == 1


SCRIPT = """
import torch, pcr_fx
from planner_cases import Net
model = Net(20, 3)
for batch in range(1, 9):  # four sizes: as many bits of samples are one
    x = torch.randn(batch, 3)
    with torch.no_grad():
        torch.testing.assert_close(pcr_fx.transform(model, x, {"kernels": False})(x), model(x))
"""


def test_processes_share_a_cache(plan_cache: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), str(Path.cwd())))}
    command = [sys.executable, "-c", SCRIPT]
    with ThreadPoolExecutor(3) as pool:
        runs = list(
            pool.map(lambda _: subprocess.run(command, env=environment, capture_output=True, text=True), range(3))
        )
    for done in runs:
        assert done.returncode == 0 and "cannot be" not in done.stderr, done.stderr
    assert len(pcr_fx.cached_plans()) == len(list(plan_cache.iterdir())) == 4


def test_a_measurement_from_disk_is_called_one(plan_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With an outcome of its own, and borne out: on a busy machine a real one may be neither kept nor believed.
    measured, _ = rigged(forward_eager=2.0, forward_sequential=1.0)
    monkeypatch.setattr(plan, "measure", measured)
    monkeypatch.setattr(plan, "is_plausible", lambda *_: True)
    x = torch.randn(4, 3)
    for found in (False, True):
        plan._plans.clear()
        fast = pcr_fx.transform(Net(40, 3), x, in_ops())
        with torch.no_grad():
            fast(x)
        assert chain_of(fast)["reason"].endswith("(by measurements kept on disk)") is found


# --- what a file may hold -----------------------------------------------------------------------------------------------


def altered(**changes: Any) -> bytes:
    """A measurement with one timing, of which something is changed; `...` leaves it out."""
    timing = {name: value for name, value in {**TIMING, **changes}.items() if value is not Ellipsis}
    return whole(timings=[timing])


def of_chain(**changes: Any) -> bytes:
    chain = {name: value for name, value in {**CHAIN, **changes}.items() if value is not Ellipsis}
    return whole(chain=chain)


def whole(**changes: Any) -> bytes:
    parts = {"chain": CHAIN, "timings": [TIMING], "made": time.time(), "load": 0.5, **changes}
    return json.dumps({name: value for name, value in parts.items() if value is not Ellipsis}).encode()


GOOD = {
    "as written": altered(),
    "not timed": altered(seconds=None, note="too slow"),
    "of no time": altered(seconds=0.0, points=[]),
    "of all blocks": altered(points=[[20, 1e-3]]),
    "gradients added": altered(adding=2e-3),
}
BROKEN = {
    "empty": b"",
    "blank": b" \n",
    "half": altered()[:-30],
    "with more behind it": altered() + altered(),
    "bytes": bytes(range(256)),
    "zeros": bytes(4096),
    "another encoding": b"\xff" + "{}".encode("utf-16"),
    "a number": b"3",
    "a text": b'"chain"',
    "a list": b"[1, 2]",
    "nothing": b"null",
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"chain":' * 100_000 + b"1" + b"}" * 100_000,
    "a long number": b'{"chain": ' + b"9" * 10_000 + b"}",
    "too large": b" " * 2**21 + altered(),
    "no chain": whole(chain=...),
    "no timings": whole(timings=...),
    "no time": whole(made=...),
    "no load": whole(load=...),
    "a time that is a text": whole(made="today"),
    "a load that is no number": whole(load=math.nan),
    "seconds that its points do not make": altered(seconds=1e-2),
    "points that are a text": altered(points="[]"),
    "a point that is a number": altered(points=[3]),
    "a point without seconds": altered(points=[[20]]),
    "a point of no blocks": altered(points=[[0, 1e-3]]),
    "a point of negative seconds": altered(points=[[20, -1e-3]]),
    "a spread that is a text": altered(spread="1"),
    "a disturbance that is a number": altered(disturbed=1),
    "negative seconds of adding": altered(adding=-1.0),
    "more than both": whole(further=1),
    "a chain that is a text": whole(chain="a chain"),
    "a chain that is a list": whole(chain=[CHAIN]),
    "no timing": whole(timings=[]),
    "timings that are an object": whole(timings={"timing": TIMING}),
    "timings that are a number": whole(timings=3),
    "a timing that is a number": whole(timings=[3]),
    "a timing that is nothing": whole(timings=[TIMING, None]),
    "a length that is a text": of_chain(length="20"),
    "a negative length": of_chain(length=-1),
    "a length that is no whole number": of_chain(length=20.5),
    "a length that is a truth": of_chain(length=True),
    "a length beyond any": of_chain(length=10**30),
    "no number of samples": of_chain(samples=...),
    "a source that is a number": of_chain(source=3),
    "seconds that are a text": altered(seconds="1e-3"),
    "negative seconds": altered(seconds=-1e-3),
    "seconds that are no number": altered(seconds=math.nan),
    "endless seconds": altered(seconds=math.inf),
    "seconds that are a truth": altered(seconds=True),
    "seconds that are a list": altered(seconds=[1e-3]),
    "iterations that are a text": altered(iterations="3"),
    "negative iterations": altered(iterations=-3),
    "iterations that are no whole number": altered(iterations=3.5),
    "another direction": altered(direction="sideways"),
    "a direction that is a list": altered(direction=["forward"]),
    "a way that is a number": altered(way=3),
    "a note that is nothing": altered(note=None),
    "a truth that is a text": altered(skipped="no"),
    "a further part": altered(pace=1),
    "no way": altered(way=...),
}


@pytest.mark.parametrize("kind", GOOD)
def test_a_good_measurement_is_read(kind: str, plan_cache: Path) -> None:
    plan_cache.mkdir()
    (plan_cache / "key.json").write_bytes(GOOD[kind])
    (timing,) = cache.load_timings("key") or ()
    assert timing.way == "eager"
    assert [kept["key"] for kept in pcr_fx.cached_plans()] == ["key"]


def test_a_measurement_expires(plan_cache: Path) -> None:
    plan_cache.mkdir()
    for age, is_read in ((0.0, True), (cache._LONGEST_SECONDS + 60, False), (-3600.0, False)):
        (plan_cache / "key.json").write_bytes(whole(made=time.time() - age))
        assert (cache.load_timings("key") is not None) is is_read


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_measurement_is_deleted(kind: str, plan_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan_cache.mkdir()
    for read in (lambda: cache.load_timings("key"), lambda: pcr_fx.cached_plans() or None):
        (plan_cache / "key.json").write_bytes(BROKEN[kind])
        with caplog.at_level(logging.WARNING, "pcr_fx"):
            assert read() is None
        assert list(plan_cache.iterdir()) == []
    assert caplog.text.count("it is made anew") == 2


def test_a_folder_in_place_of_a_measurement_is_deleted(plan_cache: Path) -> None:
    (plan_cache / "key.json" / "in it").mkdir(parents=True)
    assert cache.load_timings("key") is None
    timing = plan.Timing(**{**TIMING, "points": ((20, 1e-3),)})
    cache.store_timings("key", CHAIN, [timing])
    assert cache.load_timings("key") == (timing,)
    (plan_cache / "other.json").mkdir()
    assert pcr_fx.clear_plans() == 2 and list(plan_cache.iterdir()) == []
