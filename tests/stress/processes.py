"""Processes that share a cache folder: at once, killed at random moments, forked."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pcr_fx import disk

ROOT = Path(__file__).parents[2]
_CALL = """
import sys, torch
import pcr_fx
from stress.models import network, samples, wrong
print("ready", flush=True)
for width in map(int, sys.argv[1:]):
    model, x = network(12, width), samples(width)
    fast = pcr_fx.transform(model, x, options={"solver": "sequential"})
    trouble = wrong(fast, model, x)
    assert not trouble, trouble
    assert "native kernel)" in str(fast.report), fast.report
    with torch.no_grad():
        assert torch.allclose(pcr_fx.transform(model, options={"kernels": False, "planning_budget": 0.2})(x), model(x), atol=1e-4)
"""


def start(folder: str, *widths: int) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PCR_FX_CACHE_DIR": folder,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", _CALL, *map(str, widths)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def trouble_of(process: subprocess.Popen[str], within: float = 600) -> list[str]:
    """What a process that had to end well says of its end."""
    _, said = process.communicate(timeout=within)
    return [f"a process ended with {process.returncode}: {said.strip()[-300:]}"] if process.returncode else []


def broken(folder: str) -> list[str]:
    """The libraries in a cache folder that are not what was kept there."""
    found = []
    for path in Path(folder).glob("*.so"):
        try:
            disk.verify(path)
        except OSError as error:
            found.append(f"left broken: {error}")
    return found


def at_once(count: int) -> list[str]:
    """So many processes whose first calls need the same kernels, which nobody has compiled yet."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [start(folder, 4) for _ in range(count)]
        troubles = [trouble for process in processes for trouble in trouble_of(process)]
        troubles += broken(folder)
        kept = len(list(Path(folder).glob("*.so")))
    print(f"{count} processes at a first call: {len(troubles)} troubles, {kept} libraries kept")
    return troubles


def killed(count: int, seed: int) -> list[str]:
    """So many processes killed at random moments of their first calls; after each, another does the same and has to end well."""
    draw, troubles, ended, typical = random.Random(seed), [], 0, 10.0
    with tempfile.TemporaryDirectory() as folder:
        for index in range(count):
            process = start(folder, 4 + index)
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(draw.uniform(0, typical))
            ended += process.poll() is not None
            process.kill()
            process.communicate()
            process, began = start(folder, 4 + index), time.perf_counter()
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            began = time.perf_counter()
            troubles += trouble_of(process)
            typical = max(2.0, 0.5 * typical + 0.5 * (time.perf_counter() - began))
            troubles += broken(folder)
    print(f"{count - ended} of {count} processes killed (the others had ended): {len(troubles)} troubles after it")
    return troubles
