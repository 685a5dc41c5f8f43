"""What runs in processes of its own, which can be cut off: the tests, and Inductor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import torch

from benchmarks.gpu.problem import Measured

ROOT = Path(__file__).parent.parent.parent
# Each a process: compiling their kernels is what most tests spend their time on.
_BODIES = ("coupled", "gated", "normed", "piecewise", "attention")
_TESTS = (
    ("tests/test_cuda.py",),
    ("tests/test_gpu_kernels.py", "-k", "not chain_agrees and not compile"),
    *(("tests/test_gpu_kernels.py", "-k", f"chain_agrees and {body}") for body in _BODIES),
)


def start(*arguments: str, to: IO[str] | None = None) -> subprocess.Popen[str]:
    """Python in the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=to, stderr=to, text=True)


def run_tests(seconds: float) -> list[str]:
    """How each part of the CUDA test suite ended: its last line, and what failed."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"tests{number}" for number in range(len(_TESTS))]
        processes = []
        for file, arguments in zip(files, _TESTS, strict=True):
            with file.open("w") as stream:
                processes.append(start("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, to=stream))
        ended = _wait(processes, seconds)
        return [
            f"`{' '.join(arguments)}`: {'' if done else f'cut off after {seconds:.0f} s; '}{_summary(file.read_text())}"
            for file, arguments, done in zip(files, _TESTS, ended, strict=True)
        ]


def _wait(processes: Sequence[subprocess.Popen[str]], seconds: float) -> list[bool]:
    """Which processes end in that time, all together; the others are ended."""
    until, ended = time.monotonic() + seconds, []
    for process in processes:
        try:
            process.wait(max(0.1, until - time.monotonic()))
            ended.append(True)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended.append(False)
    return ended


def _summary(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return "; ".join([*failed, *lines[-1:]])


def inductor_times(width: int, lengths: Sequence[int], seconds: float) -> Iterator[tuple[int, Measured | str]]:
    """For each length `torch.compile(mode="reduce-overhead")`, or why there is no figure."""
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inductor"
        with file.open("w") as stream:
            process = start("-m", "benchmarks.gpu.inductor", backend, str(width), *map(str, lengths), to=stream)
        (ended,) = _wait([process], seconds)
        text = file.read_text()
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    for one in found:
        name = f"{backend}, reduce-overhead, compiled in {one['compile_s']:.0f} s"
        yield one["length"], Measured(name, one["us"], one["error"])
    why = _summary(text) if ended else f"not compiled after {seconds:.0f} s"
    for length in lengths[len(found) :]:
        yield length, f"{backend}, reduce-overhead: {why}"
