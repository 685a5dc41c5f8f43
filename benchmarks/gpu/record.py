"""The record of a run, written after every section, so that one that is cut off leaves what it had."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tabulate import tabulate

from benchmarks.measure import processor

HEADERS = (
    "what", "ours", "ours, us", "against", "theirs, us", "times faster", "goal", "met", "error", "theirs", "iterations",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One figure. Times are medians in microseconds; errors are relative to float64.

    Attributes:
        goal: how many times faster it is to be, and how fast at least; `None` where there is no goal.
    """

    what: str
    ours: str
    ours_us: float | None
    error: float | None = None
    iterations: int | None = None
    against: str = ""
    theirs_us: float | None = None
    theirs_error: float | None = None
    goal: float | None = None
    goal_us: float | None = None

    @property
    def gain(self) -> float | None:
        return self.theirs_us / self.ours_us if self.ours_us and self.theirs_us else None

    @property
    def met(self) -> bool | None:
        if self.goal is None or self.gain is None or self.ours_us is None:
            return None
        return self.gain >= self.goal and (self.goal_us is None or self.ours_us <= self.goal_us)

    def cells(self) -> list[str]:
        goal = "" if self.goal is None else f"{self.goal:g}x"
        goal += "" if self.goal_us is None else f", <= {self.goal_us:g} us"
        return [
            self.what,
            self.ours,
            _text(self.ours_us, ".4g"),
            self.against,
            _text(self.theirs_us, ".4g"),
            _text(self.gain, ".3g"),
            goal,
            {True: "yes", False: "NO", None: ""}[self.met],
            _text(self.error, ".0e"),
            _text(self.theirs_error, ".0e"),
            _text(self.iterations, "d"),
        ]

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "gain": self.gain, "met": self.met}


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


@dataclass
class Section:
    """What one part of the bench found. `problems`: what failed, and why it ended early."""

    title: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    ended: bool = False

    def __str__(self) -> str:
        parts = [f"## {self.title}"]
        if self.rows:
            parts.append(
                tabulate([row.cells() for row in self.rows], HEADERS, tablefmt="github", disable_numparse=True)
            )
        if self.problems:
            parts.append("**Not complete:** " + "; ".join(dict.fromkeys(self.problems)))
        return "\n\n".join([*parts, *self.notes])


@dataclass
class Record:
    """All sections so far; written to `folder/gpu.{md,json}`, or nowhere."""

    folder: Path | None
    sections: list[Section] = field(default_factory=list)

    def write(self) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "gpu.md").write_text(str(self) + "\n")
        sections = [{**asdict(one), "rows": [row.to_dict() for row in one.rows]} for one in self.sections]
        data = {"machine": machine(), "sections": sections}
        (self.folder / "gpu.json").write_text(json.dumps(data, indent=1) + "\n")

    def __str__(self) -> str:
        about = ", ".join(f"{name} {value}" for name, value in machine().items())
        head = (
            f"# Fused kernels on a GPU\n\n{about}.\n\nMedians in microseconds, warm, by CUDA events; ours and what says so "
            "replayed from CUDA graphs. Errors are the largest of any output or gradient, relative to the largest number "
            "of it in float64."
        )
        return "\n\n".join([head, *map(str, self.sections)])


def machine() -> dict[str, str]:
    """What it ran on."""
    found = {
        "PyTorch": torch.__version__,
        "Triton": _triton(),
        "Python": platform.python_version(),
        "commit": _commit(),
    }
    if torch.cuda.is_available():
        found = {"GPU": torch.cuda.get_device_name(), "driver": _driver(), "CUDA": str(torch.version.cuda), **found}
    return {**found, "processor": processor()}


def _triton() -> str:
    import triton

    return str(triton.__version__)


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


def _commit() -> str:
    return _output(["git", "describe", "--always", "--dirty"])


def _driver() -> str:
    return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
