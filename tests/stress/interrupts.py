"""Ctrl-C at random moments of five stages: the next call is right, and has its chain.

PyTorch does not survive every interrupt: one that arrives while its C++ calls Python for what a fake tensor does ends the
process (`terminate called after throwing an instance of 'pybind11::error_already_set'`). So it goes with about one in ten that
arrive while Dynamo reads a model, whatever the backend. Here interrupts come once this package is at work, in processes that
are started again where one is ended so; such moments are counted apart if nothing of this package was on the stack.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

import pcr_fx
from pcr_fx.backend import deeppcr
from stress.models import network, samples, wrong

_PACKAGE = str(Path(pcr_fx.__file__).parent)


class _Start:
    """When this package began with a call."""

    def __init__(self) -> None:
        self.is_over, self.time = threading.Event(), 0.0

    def __call__(self) -> None:
        self.time = time.perf_counter()
        self.is_over.set()


_start = _Start()


def _fast(way: str, model: torch.nn.Module, x: torch.Tensor, options: dict[str, Any]) -> tuple[Any, Callable[[], Any]]:
    """The model made fast in one of two ways, and what gives its report after a call."""
    if way == "transform":
        _start()
        fast = pcr_fx.transform(model, x, options=options)
        return fast, lambda: fast.report

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        _start()
        return deeppcr(graph, inputs, options={**options, "inner_backend": "eager"})

    torch._dynamo.reset()
    return torch.compile(model, backend=backend), pcr_fx.report


def _first_call(length: int, width: int, **options: Any) -> Callable[[str], str]:
    """A model from its first reading to its first gradients; it returns what is wrong with them."""

    def run(way: str) -> str:
        model, x = network(length, width), samples(width)
        fast, report = _fast(way, model, x, options)
        trouble = wrong(fast, model, x)
        if trouble:
            return trouble
        found = report().to_dict()["chains"]
        if [chain["length"] for chain in found] != [length]:
            return f"chains of {[chain['length'] for chain in found]} blocks where there is one of {length}"
        if options.get("kernels", True) and "native" not in str(report()):
            return f"no native kernel: {report()}"
        return ""

    return run


# Each is a model that spends most of its first call in that stage. What was read, traced or compiled once is kept, so that
# sizes have to be new.
STAGES: dict[str, Callable[[int], Callable[[str], str]]] = {
    "reading": lambda new: _first_call(200 + new, 4, kernels=False, solver="sequential"),
    "tracing": lambda new: _first_call(12 + new, 4, solver="sequential"),
    "compiling": lambda new: _first_call(12, 5 + new, solver="sequential"),
    "measuring": lambda new: _first_call(40 + new, 3, kernels=False, plan_cache=False, planning_budget=0.5),
    "solving": lambda new: _solving(new),
}
_solvers: dict[str, tuple[torch.nn.Module, torch.Tensor, Any]] = {}


def _solving(_: int) -> Callable[[str], str]:
    """Training steps of models that are ready, by Newton's method from the previous trajectory, and by a kernel."""

    def run(way: str) -> str:
        _start()
        for solver in ("newton", "sequential"):
            if solver not in _solvers:
                model, x = network(64, 4), samples(4)
                options = {"solver": solver, "start": "previous"} if solver == "newton" else {"solver": solver}
                _solvers[solver] = model, x, pcr_fx.transform(model, x, options=options)
            model, x, fast = _solvers[solver]
            for _ in range(10):
                if trouble := wrong(fast, model, x):
                    return f"{solver}: {trouble}"
            if fast.report.to_dict()["chains"][0]["fallbacks"]:
                return f"{solver} did not solve the chain"
        return ""

    return run


def be_interruptible() -> None:
    """Undo what a shell does with what it runs in the background: interrupts are ignored there."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def interrupted_after(seconds: float, start: threading.Event | None = None) -> Iterator[None]:
    """SIGINT to this process in so many seconds, unless the block has ended by then; it ends with a `KeyboardInterrupt`.

    Python drops what is raised in callbacks of its garbage collector and in finalisers, an interrupt as well: the former do not
    run meanwhile, and for the latter there is another interrupt after a minute.

    Args:
        start: what the seconds count from, if not from now.
    """
    over, lock = threading.Event(), threading.Lock()

    def interrupt() -> None:
        if start is not None:
            start.wait()
        pause = seconds
        while not over.wait(pause):
            with lock:
                if not over.is_set():
                    os.kill(os.getpid(), signal.SIGINT)
            pause = 60.0

    thread = threading.Thread(target=interrupt, daemon=True)
    collects = gc.isenabled()
    gc.disable()
    thread.start()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        with lock:
            over.set()
        if start is not None:
            start.set()
        thread.join()


@dataclass
class Interrupted:
    """What became of one call that was to be interrupted, and of the one after it.

    Attributes:
        is_hit: whether the call had not ended by then.
        trouble: what was wrong with the next call; nothing if it was right.
    """

    name: str
    stage: str
    is_hit: bool
    trouble: str = ""


class Calls:
    """Calls to interrupt, numbered; those of one stage take turns with those of the others."""

    def __init__(self, seed: int, unused: int, ways: Sequence[str] = ("transform", "compile")) -> None:
        """`unused`: a size from which on none of the calls to come has it."""
        self.seed, self.ways, self.unused = seed, ways, count(unused)
        self.typical: dict[tuple[str, str], float] = {}

    def interrupt(self, index: int) -> Interrupted:
        draw = random.Random(f"{self.seed} {index}")
        stage, way = list(STAGES)[index % len(STAGES)], draw.choice(self.ways)
        if (stage, way) not in self.typical:
            self.typical[stage, way], trouble = _timed(STAGES[stage](next(self.unused)), way)
            assert not trouble, f"not even an undisturbed call is right: {trouble}"
        call = STAGES[stage](index // len(STAGES))
        moment = draw.uniform(0, self.typical[stage, way])
        result = Interrupted(f"{index}, {stage} by {way}, after {moment:.3f} s", stage, False)
        print(f"begun: {result.name}", flush=True)
        _start.is_over.clear()
        try:
            with interrupted_after(moment, _start.is_over):
                call(way)
            time.sleep(0.01)
        except KeyboardInterrupt as error:
            result.is_hit = True
            result.name += " ".join(traceback.format_tb(error.__traceback__)[-1].split()[:6])
        seconds, result.trouble = _timed(call, way)
        self.typical[stage, way] = min(self.typical[stage, way], seconds)
        return result


def _timed(call: Callable[[str], str], way: str) -> tuple[float, str]:
    """How many seconds a call took of this package, and what is wrong with it."""
    try:
        trouble = call(way)
    except Exception as error:
        trouble = f"{type(error).__name__}: {error}"
    return time.perf_counter() - _start.time, trouble


def run(calls: int, seed: int) -> list[str]:
    """Interrupt so many calls, as many of each stage, and return what was wrong with those that followed."""
    results, ended, troubles = list[Interrupted](), list[str](), list[str]()
    while len(results) + len(ended) < calls and not troubles:
        made, begun, said = _process(len(results) + len(ended), calls, seed, len(ended))
        results += made
        if said:
            name = f"{begun}: the process ended:\n{said}"
            (ended if _is_pytorchs(said) else troubles).append(name)
    hits = {stage: sum(one.is_hit for one in results if one.stage == stage) for stage in STAGES}
    troubles += [f"{one.name}: {one.trouble}" for one in results if one.trouble]
    print(
        f"{sum(hits.values())} of {len(results)} calls interrupted {hits}, {len(troubles)} troubles after it; "
        f"{len(ended)} more that PyTorch's own code did not survive"
    )
    for one in ended:
        print(
            f"  {one.splitlines()[0]} at", *[line.strip() for line in one.splitlines() if "site-packages" in line][:1]
        )
    return troubles


def _process(first: int, end: int, seed: int, before: int) -> tuple[list[Interrupted], str, str]:
    """What became of calls in a process of their own, which one was begun last, and what it said if that ended it."""
    numbers = map(str, (first, end, seed, end // len(STAGES) + 1 + 2 * before))
    done = subprocess.run([sys.executable, "-m", __spec__.name, *numbers], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    results = [Interrupted(**json.loads(line)) for line in lines if line.startswith("{")]
    begun = [line for line in lines if line.startswith("begun: ")]
    return results, begun[-1] if begun else "", done.stderr or str(done.returncode) if done.returncode else ""


def _is_pytorchs(said: str) -> bool:
    """Whether what ended a process was an interrupt within C++ that only PyTorch's own Python had called."""
    _, _, stack = said.partition("terminate called after throwing an instance of 'pybind11::error_already_set'")
    return "KeyboardInterrupt" in stack and "\nAt:" in stack and _PACKAGE not in stack


def _main(first: int, end: int, seed: int, unused: int) -> None:
    calls = Calls(seed, unused)
    for index in range(first, end):
        print(json.dumps(asdict(calls.interrupt(index))), flush=True)


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
