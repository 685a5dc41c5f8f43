"""`python -m benchmarks.under_load`: what is planned, and what calls take, while two other processes work in bursts.

Chains are planned over and over from an empty folder while others take the cores for a tenth of a second to a second at a time.
Each choice is then judged in peace: the ways that it names are called in turn with all others, and the minima compared. Run it
on a machine that is otherwise idle; with more of one's own (`--others`), it is a harder test.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import pcr_fx
from benchmarks.measure import record
from benchmarks.models import residual_net
from pcr_fx.planner import Choice
from pcr_fx.planner import plan as plans
from pcr_fx.planner.cache import plan_directory
from pcr_fx.ways import EAGER, candidates

# Blocks, width, samples.
CASES = ((16, 8, 64), (64, 32, 32), (256, 16, 4), (128, 64, 128), (32, 128, 16))
# In another process: work for a while, rest for a while.
BURSTS = """
import random, time
random.seed({seed})
while True:
    until = time.perf_counter() + random.uniform(0.1, 1.0)
    while time.perf_counter() < until:
        pass
    time.sleep(random.uniform(0.1, 1.0))
"""
FAR, TOO_FAR, KEPT_FAR = 1.5, 3.0, 1.25
ROUNDS = 25
# Calls whose mean is taken, and seconds that they may take together.
MOST_CALLS, LONGEST_SECONDS = 60, 4.0
JUDGING_SECONDS = 20.0


@contextlib.contextmanager
def others_at_work(count: int) -> Iterator[None]:
    """So many other processes that work in bursts."""
    started = [subprocess.Popen([sys.executable, "-c", BURSTS.format(seed=seed)]) for seed in range(count)]
    try:
        time.sleep(0.2)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


Pair = tuple[str, str]
ALONE: Pair = (EAGER, EAGER)


@dataclass(frozen=True)
class Planned:
    """What a planning chose for training: a way each direction, or the model's own ops; and whether that was kept on disk."""

    pair: Pair
    is_kept: bool
    seconds: float


class Training:
    """A chain of residual blocks that is trained, by eager or planned anew."""

    def __init__(self, length: int, width: int, batch: int) -> None:
        self.model, self.x = residual_net(length, width), torch.randn(batch, width)
        self.fast: Any = None

    def plan(self) -> Planned:
        """As a new process does it with an empty folder; kernels are compiled already."""
        plans._plans.clear()
        with tempfile.TemporaryDirectory() as folder, patched("PCR_FX_CACHE_DIR", folder):
            self.fast = pcr_fx.transform(self.model, self.x, {"min_length": 8})
            self.entry.plan.kernel.is_ready("forward", self.x), self.entry.plan.kernel.is_ready("adjoint", self.x)
            began = time.perf_counter()
            self.fast(self.x)
            seconds, choice = time.perf_counter() - began, self.entry.present_choice
            pair = ALONE if choice.leaves_alone(True) else (choice.forward.name, choice.backward.name)
            return Planned(pair, bool(list(plan_directory().glob("*.json"))), seconds)

    @property
    def entry(self) -> Any:
        (entry,) = self.fast.report.chains
        return entry

    def by(self, pair: Pair) -> Callable[[], Any]:
        """A training step by these ways, whatever is planned."""
        if pair == ALONE:
            return self.step(self.model)
        fast = pcr_fx.transform(self.model, self.x, {"plan_cache": False, "planning": "estimated"})
        (entry,) = fast.report.chains
        plan, samples = entry.plan, len(self.x)
        found = [
            next(way for way in candidates(plan._case(samples), direction)[0] if way.name == name)
            for name, direction in zip(pair, ("forward", "backward"), strict=True)
        ]
        plan.learnt.choices[plan._size(samples)] = Choice(*found, "asked for", asked_for=True)  # type: ignore[arg-type]
        step = self.step(fast)
        step()  # which keeps its route, whatever else is planned of this chain
        return step

    def pairs(self) -> list[Pair]:
        """Every combination of ways block by block."""
        case = self.entry.plan._case(len(self.x))
        ways = [[w.name for w in candidates(case, d)[0] if w.kind and not w.iterates] for d in ("forward", "backward")]
        return [ALONE, *itertools.product(*ways)]  # type: ignore[list-item]

    def step(self, model: nn.Module) -> Callable[[], Any]:
        def step() -> None:
            model.zero_grad()
            model(self.x).sum().backward()

        return step

    def judged(self) -> dict[Pair, float]:
        """The least seconds of a step by each pair of ways, called in turn."""
        steps = {pair: self.by(pair) for pair in self.pairs()}
        times: dict[Pair, list[float]] = {pair: [] for pair in steps}
        for _ in range(ROUNDS):
            if sum(map(sum, times.values())) > JUDGING_SECONDS:
                break
            for pair, step in steps.items():
                step()
                times[pair].append(seconds_of(step))
        return {pair: min(taken) for pair, taken in times.items()}


@contextlib.contextmanager
def patched(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def seconds_of(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def mean_seconds(step: Callable[[], Any]) -> float:
    """Of some calls: what stalls now and then counts."""
    taken: list[float] = []
    while len(taken) < MOST_CALLS and sum(taken) < LONGEST_SECONDS:
        taken.append(seconds_of(step))
    return statistics.fmean(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--plannings", type=int, default=100)
    parser.add_argument("--others", type=int, default=2)
    arguments = parser.parse_args()
    each = max(1, arguments.plannings // len(CASES))
    rows, far, too_far, wrongly_kept, slow = [], 0, 0, 0, 0
    for case in CASES:
        training = Training(*case)
        training.plan()
        calls = {"eager": training.step(training.model), "auto": training.step(training.fast)}
        for call in calls.values():
            call()
        peace = {name: mean_seconds(call) for name, call in calls.items()}
        with others_at_work(arguments.others):
            loaded = {name: mean_seconds(call) for name, call in calls.items()}
            made = [training.plan() for _ in range(each)]
        times = training.judged()
        best = min(times.values())
        ratios = [times.get(one.pair, math.inf) / best for one in made]
        kept = [ratio for one, ratio in zip(made, ratios, strict=True) if one.is_kept]
        slowdown = {name: loaded[name] / peace[name] for name in calls}
        far += sum(ratio > FAR for ratio in ratios)
        too_far += sum(ratio > TOO_FAR for ratio in ratios)
        wrongly_kept += sum(ratio > KEPT_FAR for ratio in kept)
        slow += slowdown["auto"] > 2 * slowdown["eager"]
        rows.append(
            (
                *case,
                min(times, key=times.__getitem__)[1],
                f"{1e3 * best:.3g}",
                f"{max(ratios):.2f}",
                sum(ratio > FAR for ratio in ratios),
                f"{len(kept)} of {each}",
                f"{max(kept, default=1.0):.2f}",
                f"{max(one.seconds for one in made):.2f}",
                f"{slowdown['auto']:.1f} ({slowdown['eager']:.1f})",
            )
        )
        print(*rows[-1], sep=" | ", flush=True)
    headers = ("L", "w", "B", "best, backward", "best, ms", "worst / best", f"over {FAR}", "kept", "worst kept / best",
               "longest, s", "calls slowed down (eager)")  # fmt: skip
    notes = (
        f"{each * len(CASES)} plannings of a training step beside {arguments.others} other processes that work in bursts: "
        f"{far} over {FAR} times the best way, {too_far} over {TOO_FAR}; {wrongly_kept} kept on disk that are over {KEPT_FAR}. "
        f"In {slow} of {len(CASES)} cases calls were slowed down more than twice as much as eager's. The best way is what has "
        f"the least of {ROUNDS} calls made in turn after the others were gone."
    )
    record("under_load", "Planning, and calls, on a busy machine", headers, rows, notes)


if __name__ == "__main__":
    main()
