"""The GPU bench goes through its motions where there is no GPU, and says what went wrong."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks.gpu.__main__ import run
from benchmarks.gpu.record import Record, Row, Section
from benchmarks.gpu.sections import PARTS, TINY, Budget, Figure, Part, Sizes
from benchmarks.gpu.subprocesses import results_of
from benchmarks.gpu.worker import measure

ROOT = Path(__file__).parent.parent


def test_a_dry_run_measures_every_part() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in PARTS.values():
        assert f"## {part.title}\n\n| what" in done.stdout


def row(what: str = "forward, L = 8, w = 4, B = 1", ours_us: float = 50.0) -> Row:
    return Row(what, "newton, fused", ours_us, 1e-7, 3, "eager", 5000.0, 2e-7, 100, 60)


def test_a_goal_is_met_by_both_of_its_numbers() -> None:
    assert row().met
    assert not row(ours_us=55.0).met
    assert not row(ours_us=70.0).met
    assert Row("growth", "newton, fused", 5.0).met is None


def test_a_figure_that_fails_is_said_to_and_the_others_are_measured(tmp_path: Path) -> None:
    def fail() -> Row:
        raise ValueError("no\nreason")

    def figures(sizes: Sizes, budget: Budget) -> Iterator[Figure]:
        yield fail
        yield row

    section = measure(Part("some", figures, 10), TINY, tmp_path / "some")
    assert section.rows == [row()] and section.problems == ["reason"] and section.ended
    assert pickle.loads((tmp_path / "some").read_bytes()) == section
    assert measure(Part("late", figures, -1), TINY, tmp_path / "late").problems == ["its -1 s were up"]


def test_tests_that_fail_or_do_not_end_are_named() -> None:
    names = [f"tests/test_some.py::test_{name}" for name in ("good[at once]", "bad[1-a]", "slow", "late")]
    outputs = [f"{names[0]} PASSED [ 50%]\n{names[1]} FAILED [100%]\nFAILED {names[1]} - no", f"{names[2]} "]
    said = results_of(names, outputs)
    assert said[0] == "1 passed, 1 failed, 2 not run to its end"
    assert said[1:] == [f"FAILED {names[1]} - no", *(f"not run to its end: {name}" for name in names[2:])]
    assert results_of([], ["ERROR collecting tests"]) == ["no tests were found", "ERROR collecting tests"]


def test_a_record_tells_everything(tmp_path: Path) -> None:
    record = Record(tmp_path / "new", [Section("one", [row()], ["a note"], ["a problem"], ended=True)])
    record.write()
    text = (tmp_path / "new" / "gpu.md").read_text()
    for part in ("| newton, fused |", "| 100x, <= 60 us |", "| yes ", "a note", "**Not complete:** a problem"):
        assert part in " ".join(text.split())
    data = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert data["sections"][0]["rows"][0]["gain"] == 100 and data["machine"]["PyTorch"]


def test_parts_that_there_is_no_time_for_are_named() -> None:
    record = Record(None)
    run(record, ["wide", "paper"], "tiny", until=0.0)
    assert [section.problems for section in record.sections] == [["no time was left"]] * 2
