"""Measurements kept on disk, a file each, so that no process has to make those that another one made.

Of two processes that write the same the last one wins. What is read is checked as if anybody could have written it, and
deleted where it is not what `store_timings` writes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Hashable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pcr_fx import artifacts, disk
from pcr_fx.planner.choice import NODE_SECONDS, Timing
from pcr_fx.planner.rounds import along
from pcr_fx.targets.cpp.build import processor

log = logging.getLogger(__name__)

# Whose code decides how long a way takes and what is measured.
_PACKAGES = ("body", "codegen", "linear", "planner", "solvers", "targets", "ways")
# What is said of a chain, for people.
_WORDS = ("modules", "source", "dtype", "device", "torch")
_COUNTS = ("length", "dimension", "samples")
_LARGEST_FILE = 2**20  # bytes
# Machines change: what is older than this is measured anew.
_LONGEST_SECONDS = 30 * 24 * 3600.0
# How far a way's seconds may be from what its own points say.
_ROUNDED = 1e-3
_PARTS = {"chain", "timings", "made", "load"}


def plan_directory() -> Path:
    """Where measurements are kept.

    Raises:
        OSError: there is no folder for them.
    """
    return disk.cache_directory() / "plans"


def measurement_key(plan: str, size: Hashable, device: torch.device) -> str:
    """Names a measurement by all that it depends on: the plan (body, L, shapes, options), batch, device, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    parts = (_code(), plan, size, name, torch.get_num_threads(), torch.__version__)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@functools.cache
def _code() -> str:
    """This package's own code: what another version measured tells nothing of what this one takes."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def load_timings(key: str) -> tuple[Timing, ...] | None:
    """The measurement kept under `key`; `None` where there is none that can be read."""
    try:
        content = _read(plan_directory() / f"{key}.json")
    except OSError:  # no folder, and what that means is said where something is written
        return None
    if content is None or not 0 <= time.time() - content["made"] <= _LONGEST_SECONDS:
        return None
    _record(key)
    return tuple(map(_timing, content["timings"]))


def store_timings(key: str, chain: dict[str, Any], timings: Iterable[Timing]) -> None:
    """Keep a measurement; `chain` says for people what it is of. How busy the machine was is kept with it."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    content = {"chain": chain, "timings": [asdict(each) for each in timings], "made": time.time(), "load": load}
    folder = None
    try:
        folder = disk.cache_directory()
        plan_directory().mkdir(mode=0o700, exist_ok=True)
        disk.write(plan_directory() / f"{key}.json", json.dumps(content, indent=1).encode())
        _record(key)
    except OSError as error:
        disk.give_up(folder, error)


def _record(key: str) -> None:
    artifacts.record(disk.cache_directory(), f"plans/{key}.json")


def cached_plans() -> list[dict[str, Any]]:
    """Every measurement that is kept, as plain values, the oldest first: the chain it is of and the time of each way."""
    found = []
    for path in plan_directory().glob("*.json"):
        with contextlib.suppress(OSError):  # another process has deleted it by now
            found.append((path.stat().st_mtime, path.stem, _read(path)))
    return [
        {"key": key, **content} for _, key, content in sorted(found, key=lambda one: one[:2]) if content is not None
    ]


def clear_plans() -> int:
    """Delete every measurement that is kept; how many those were. Compiled kernels stay."""
    paths = list(plan_directory().glob("*.json"))
    for path in paths:
        disk.delete(path)
    return len(paths)


def _read(path: Path) -> dict[str, Any] | None:
    """What a file holds; `None` where there is none, and where it is no measurement, which is deleted."""
    try:
        content = json.loads(disk.read(path, _LARGEST_FILE))
        _check(content)
        return content
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("%s is no measurement (%s: %s); it is made anew", path, type(error).__name__, error)
        disk.delete(path)
        return None


def _check(content: Any) -> None:
    """Raise what `_read` catches unless `content` is what `store_timings` writes."""
    chain, timings = content["chain"], content["timings"]
    if set(content) != _PARTS or not isinstance(timings, list) or not timings:
        raise ValueError("it must have a chain, timings, a time and a load")
    if not all(_is_number(content[name]) for name in ("made", "load")):
        raise ValueError("its time or its load is no number")
    if not all(isinstance(chain[name], str) for name in _WORDS) or not all(_is_count(chain[name]) for name in _COUNTS):
        raise ValueError("its chain is not described by words and counts")
    for timing in map(_timing, timings):
        if timing.points and timing.seconds is not None:
            own = along(timing.points, max(chain["length"], timing.points[-1][0]))
            if not own * (1 - _ROUNDED) <= timing.seconds <= own * (1 + _ROUNDED) + max(NODE_SECONDS.values()):
                raise ValueError(f"{timing.way} took {timing.seconds:g} seconds, and by its own points {own:g}")


def _timing(content: Any) -> Timing:
    points = content["points"]
    if type(points) is not list or not all(type(point) is list and len(point) == 2 for point in points):
        raise ValueError(f"its points {points!r:.200} are no pairs")
    timing = Timing(**{**content, "points": tuple(map(tuple, points))})
    words = isinstance(timing.way, str) and isinstance(timing.note, str) and timing.direction in ("forward", "backward")
    if not words or type(timing.skipped) is not bool or not _is_count(timing.iterations):
        raise ValueError(f"its timing {timing!r:.200} has a part of another type")
    if not all(_is_count(size) and size and _is_number(seconds) for size, seconds in timing.points):
        raise ValueError(f"its points {points!r:.200} are no blocks and seconds")
    if type(timing.disturbed) is not bool or not _is_number(timing.spread):
        raise ValueError(f"its timing {timing!r:.200} was disturbed in no known manner")
    for seconds in (timing.seconds, timing.adding):
        if seconds is not None and not _is_number(seconds):
            raise ValueError(f"a way took {seconds!r:.50} seconds")
    return timing


def _is_number(value: Any) -> bool:
    return type(value) is float and 0 <= value < math.inf


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
