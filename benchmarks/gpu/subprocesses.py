"""What runs in processes of its own, which can be cut off: the tests, and Inductor."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import torch

from benchmarks.gpu.problem import Measured

ROOT = Path(__file__).parent.parent.parent
_TESTS = ("tests/test_cuda.py", "tests/test_gpu_kernels.py", "tests/test_gpu_kernels_wide.py")
# They need no GPU, and compile for a minute.
_NOT_HERE = "not kernels_compile"
# The tests are dealt to as many processes: compiling their kernels is what they spend their time on.
_PROCESSES = 12


def start(*arguments: str, to: IO[str] | None = None) -> subprocess.Popen[str]:
    """Python in the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=to, stderr=to, text=True)


def run_tests(seconds: float) -> list[str]:
    """The CUDA test suite: how many tests passed in that time, and each that did not."""
    options = ("-u", "-m", "pytest", "-p", "no:cacheprovider")
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found"
        with found.open("w") as stream:
            start(*options, "-q", "--collect-only", "-k", _NOT_HERE, *_TESTS, to=stream).wait()
        names = [line for line in found.read_text().splitlines() if line.startswith("tests/") and "::" in line]
        files = [Path(folder) / f"tests{number}" for number in range(min(_PROCESSES, len(names)))]
        processes = []
        for number, file in enumerate(files):
            with file.open("w") as stream:
                processes.append(start(*options, "-v", "--tb=line", *names[number :: len(files)], to=stream))
        _wait(processes, seconds)
        return results_of(names, [found.read_text(), *(file.read_text() for file in files)])


def results_of(names: Sequence[str], outputs: Sequence[str]) -> list[str]:
    """What pytest, as verbose as can be, said of the tests of these names; no word is of one that did not end."""
    text = "\n".join(outputs)
    # Names may have spaces in them.
    ended = dict(re.findall(r"^(\S+::.*?) ([A-Z]{4,})(?: |$)", text, re.MULTILINE))
    count = Counter(ended.get(name, "not run to its end") for name in names)
    said = [", ".join(f"{number} {what.lower()}" for what, number in count.items()) or "no tests were found"]
    said += re.findall(r"^(?:FAILED|ERROR) .*", text, re.MULTILINE)
    return said + [f"not run to its end: {name}" for name in names if name not in ended]


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
