"""Measurements kept on disk, a file each, so that no process has to make those that another one made.

Files are written apart and moved into place: a process that reads sees all of one or nothing, and of two that write the
same the last one wins.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Hashable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pcr_fx.planner.choice import Timing
from pcr_fx.targets.cpp.build import cache_directory, processor

log = logging.getLogger(__name__)

# Whose code decides how long a way takes and what is measured.
_PACKAGES = ("body", "codegen", "linear", "planner", "solvers", "targets", "ways")


def plan_directory() -> Path:
    """Where measurements are kept."""
    return cache_directory() / "plans"


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
        content = json.loads((plan_directory() / f"{key}.json").read_text())
        return tuple(Timing(**timing) for timing in content["timings"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the measurement kept in %s cannot be read (%s); it is made anew", plan_directory() / key, error)
        return None


def store_timings(key: str, chain: dict[str, Any], timings: Iterable[Timing]) -> None:
    """Keep a measurement; `chain` says for people what it is of."""
    content = {"chain": chain, "timings": [asdict(timing) for timing in timings]}
    try:
        folder = plan_directory()
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
        os.replace(name, folder / f"{key}.json")
    except OSError as error:
        log.warning("measurements cannot be kept in %s (%s)", plan_directory(), error)


def cached_plans() -> list[dict[str, Any]]:
    """Every measurement that is kept, as plain values, the oldest first: the chain it is of and the time of each way."""
    found = []
    for path in sorted(plan_directory().glob("*.json"), key=lambda path: path.stat().st_mtime):
        try:
            found.append({"key": path.stem, **json.loads(path.read_text())})
        except (OSError, ValueError):
            log.warning("%s cannot be read", path)
    return found


def clear_plans() -> int:
    """Delete every measurement that is kept; how many those were. Compiled kernels stay."""
    paths = list(plan_directory().glob("*.json"))
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)
