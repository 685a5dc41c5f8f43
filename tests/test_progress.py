"""What takes long says what it is."""

import logging
import sys
import threading
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from models import plain_mlp

import pcr_fx
from pcr_fx import progress
from pcr_fx.progress import stage


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "_PATIENCE", 0.01)
    monkeypatch.setattr(progress, "_TICK", 0.01)
    caplog.set_level(logging.INFO, "pcr_fx")


def until(condition: Any) -> None:
    """Wait for another thread, for as long as a busy machine may take."""
    ends = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)


def test_what_takes_long_is_said_at_its_begin_and_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    with stage("counting sheep"):
        until(lambda: "still counting sheep" in caplog.text)
    assert "done with counting sheep after" in caplog.text


def test_what_is_quick_says_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "_PATIENCE", 3600.0)
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), stage("dividing"):
        1 / 0  # noqa: B018
    until(lambda: threading.active_count() <= before)
    assert not caplog.records


class Bar:
    """In place of tqdm's."""

    made: list["Bar"] = []  # noqa: RUF012

    def __init__(self, **given: Any) -> None:
        self.given, self.looks, self.is_closed = given, 0, False
        self.made.append(self)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed = True

    def refresh(self) -> None:
        self.looks += 1


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    """Those that are drawn on what is a terminal now."""
    module = ModuleType("tqdm")
    module.tqdm = Bar  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm", module)
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: True)))
    monkeypatch.setattr(Bar, "made", [])
    return Bar.made


def test_a_terminal_has_one_bar_while_it_takes(bars: list[Bar], caplog: pytest.LogCaptureFixture) -> None:
    with stage("counting sheep"):
        until(lambda: bars and bars[0].looks > 1)
        with stage("counting their legs"):
            until(lambda: "still counting their legs" in caplog.text)
        assert not bars[0].is_closed
    until(lambda: bars[0].is_closed)
    assert [bar.given["desc"] for bar in bars] == ["pcr_fx is counting sheep"]


@pytest.mark.parametrize("is_there", [False, True])
def test_without_tqdm_or_with_one_that_fails_there_is_the_log(
    is_there: bool, bars: list[Bar], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if is_there:
        monkeypatch.setattr(Bar, "refresh", lambda self: 1 / 0)
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    with stage("counting sheep"):
        until(lambda: "still counting sheep" in caplog.text and progress._terminal.acquire(blocking=False))
        progress._terminal.release()
    assert len(bars) == is_there


def test_a_first_call_says_what_it_does(
    plan_cache: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    torch.manual_seed(0)
    x = torch.randn(3, 3)
    with torch.no_grad():
        pcr_fx.transform(plain_mlp(9, 3), x)(x)
    said = [record.getMessage() for record in caplog.records if record.name == "pcr_fx.progress"]
    for words in ("reading Sequential and finding", "tracing a block of", "compiling a kernel", "measuring what runs"):
        assert any(f"done with {words}" in one for one in said), words
    torch._dynamo.reset()
    torch.compile(plain_mlp(9, 3), backend="deeppcr", options={"inner_backend": "eager"})(x)
    said = [record.getMessage() for record in caplog.records]
    assert any("finding chains in a graph of" in one for one in said)
    assert any("having the inner backend compile" in one for one in said)
