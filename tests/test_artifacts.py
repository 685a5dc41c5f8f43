"""Kernels and plans travel among the artifacts of `torch.compiler.save_cache_artifacts`."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planner_cases import CHAIN, TIMING
from torch.compiler._cache import CacheArtifactManager

from pcr_fx import artifacts
from pcr_fx.artifacts import KeptFile
from pcr_fx.planner import Timing
from pcr_fx.planner.cache import load_timings, store_timings

MODEL = """
import sys, torch, pcr_fx
from pcr_fx.targets.cpp import build
torch.manual_seed(0)
model = torch.nn.Sequential(*(layer for _ in range(12) for layer in (torch.nn.Linear(4, 4), torch.nn.Tanh())))
x = torch.linspace(-1, 1, 20).view(5, 4)
"""
MAKE = """
torch.compile(model, backend="deeppcr", options={"solver": "sequential", "inner_backend": "eager"})(x).sum().backward()
found, info = torch.compiler.save_cache_artifacts()
print(info.pcr_fx_artifacts)
open("artifacts", "wb").write(found)
"""
USE = """
def refuse(*_):
    raise AssertionError("a kernel was compiled, which the artifacts should have had")
build._compile = refuse
info = torch.compiler.load_cache_artifacts(open("artifacts", "rb").read())
print(info.pcr_fx_artifacts)
fast = torch.compile(model, backend="deeppcr", options={"solver": "sequential", "inner_backend": "eager"})
torch.testing.assert_close(fast(x), model(x))
fast(x).sum().backward()
"""


def run(script: str, folder: Path, cache: str) -> str:
    environment = {**os.environ, "PCR_FX_CACHE_DIR": str(folder / cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", MODEL + script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_another_cache_folder_is_filled(tmp_path: Path) -> None:
    made = run(MAKE, tmp_path, "here")
    assert ".so" in made
    assert run(USE, tmp_path, "there") == made


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PCR_FX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


KEY = 32 * "a"


def test_plans_travel(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timings = [Timing(**{**TIMING, "points": ((20, 1e-3),)})]
    with CacheArtifactManager.with_fresh_cache():
        store_timings(KEY, CHAIN, timings)
        found = torch.compiler.save_cache_artifacts()
    assert found is not None and found[1].pcr_fx_artifacts == [f"plans/{KEY}.json"]
    kept = load_timings(KEY)
    monkeypatch.setenv("PCR_FX_CACHE_DIR", str(tmp_path / "another"))
    assert load_timings(KEY) is None
    torch.compiler.load_cache_artifacts(found[0])
    assert kept is not None and load_timings(KEY) == kept


@pytest.mark.parametrize(
    "key", [f"../{KEY}.so", f"plans/../../{KEY}.json", "kernel.so", f"{KEY}.py", f"/tmp/{KEY}.so", ""]
)
def test_only_files_of_this_package_are_kept(key: str, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = KeptFile(f"{KEY}.json", b"").content
    KeptFile(key, content).populate_cache()
    assert "not kept" in caplog.text
    assert not list(cache.rglob("*.*"))


def test_what_is_damaged_on_its_way_is_not_kept(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "plans").mkdir()
    path = tmp_path / "plans" / f"{KEY}.json"
    path.write_text("{}")
    content = KeptFile(f"plans/{KEY}.json", path).content
    for damaged in (content[:-1], content[1:], b"", content + b" "):
        KeptFile(f"plans/{KEY}.json", damaged).populate_cache()
    assert not list(cache.rglob("*.*"))
    KeptFile(f"plans/{KEY}.json", content).populate_cache()
    assert (cache / "plans" / f"{KEY}.json").read_text() == "{}"


def test_what_is_gone_meanwhile_is_left_out(cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with CacheArtifactManager.with_fresh_cache():
        artifacts.record(tmp_path, f"{KEY}.so")
        artifacts.record(tmp_path, f"{KEY}.so")
        found = torch.compiler.save_cache_artifacts()
    assert found is not None and found[1].pcr_fx_artifacts == [f"{KEY}.so"]
    with caplog.at_level(logging.WARNING):
        torch.compiler.load_cache_artifacts(found[0])
    assert not list(cache.rglob("*.*")) and "not kept" in caplog.text
