"""Ctrl-C at random moments of five stages: the next call is right, and has its chain."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch

import pcr_fx
from stress.models import network, samples, wrong

_fresh = count()


def _fast(way: str, model: torch.nn.Module, x: torch.Tensor, options: dict[str, Any]) -> tuple[Any, Callable[[], Any]]:
    """The model made fast in one of two ways, and what gives its report after a call."""
    if way == "transform":
        fast = pcr_fx.transform(model, x, options=options)
        return fast, lambda: fast.report
    torch._dynamo.reset()
    return torch.compile(model, backend="deeppcr", options={**options, "inner_backend": "eager"}), pcr_fx.report


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


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """SIGINT to this process in so many seconds, unless the block has ended by then; it ends with a `KeyboardInterrupt`."""
    over, lock = threading.Event(), threading.Lock()

    def interrupt() -> None:
        if not over.wait(seconds):
            with lock:
                if not over.is_set():
                    os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        with lock:
            over.set()
        thread.join()


def run(count: int, seed: int) -> list[str]:
    """Interrupt so many calls, as many of each stage, and return what was wrong with those that followed."""
    draw, troubles, hits = random.Random(seed), [], dict.fromkeys(STAGES, 0)
    typical: dict[tuple[str, str], float] = {}
    for index in range(count):
        stage, way = list(STAGES)[index % len(STAGES)], draw.choice(["transform", "compile"])
        if (stage, way) not in typical:
            began = time.perf_counter()
            assert not STAGES[stage](next(_fresh))(way), "not even an undisturbed call is right"
            typical[stage, way] = time.perf_counter() - began
        call = STAGES[stage](next(_fresh))
        moment = draw.uniform(0, typical[stage, way])
        try:
            with interrupted_after(moment):
                call(way)
            time.sleep(0.01)
        except KeyboardInterrupt:
            hits[stage] += 1
        began = time.perf_counter()
        trouble = _after(call, way)
        typical[stage, way] = min(typical[stage, way], time.perf_counter() - began)
        if trouble:
            troubles.append(f"{stage} by {way}, interrupted after {moment:.3f} s: {trouble}")
    print(
        f"{sum(hits.values())} of {count} calls interrupted ({hits}), {len(troubles)} of those that followed are wrong"
    )
    return troubles


def _after(call: Callable[[str], str], way: str) -> str:
    try:
        return call(way)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
