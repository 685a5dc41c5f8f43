"""Measures parts of the bench in a process of its own, which can be ended if a kernel never ends.

    python -m benchmarks.gpu.worker FOLDER full|tiny NAME...

Leaves in the folder what it has of each part, figure by figure.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
import traceback
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks.gpu.record import Section
from benchmarks.gpu.sections import FULL, PARTS, TINY, Budget, Part, Sizes
from pcr_fx.planner import plan
from pcr_fx.targets import TritonKernel


def measure(part: Part, sizes: Sizes, file: Path) -> Section:
    """All figures of a part that there is time for; those that fail are said to."""
    section, began = Section(part.title), time.monotonic()
    budget = Budget.of(part.seconds)
    try:
        for figure in part.figures(sizes, budget):
            if budget.left <= 0:
                section.problems.append(f"its {part.seconds:.0f} s were up")
                break
            try:
                section.rows.append(figure())
            except Exception as failure:
                section.problems.append(_last_line(failure))
            _keep(section, file)
    except Exception as failure:
        section.problems.append(_last_line(failure))
    section.notes += [*filter(None, [part.note]), *part.summary(section)]
    section.seconds, section.ended = time.monotonic() - began, True
    _keep(section, file)
    return section


def _last_line(failure: Exception) -> str:
    return "".join(traceback.format_exception_only(failure)).strip().splitlines()[-1]


def _keep(section: Section, file: Path) -> None:
    """As a whole or not at all: it is read meanwhile."""
    new = file.with_suffix(".new")
    new.write_bytes(pickle.dumps(section))
    new.replace(file)


def main() -> None:
    folder, sizes, *names = sys.argv[1:]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan.KERNELS[device] = TritonKernel
    for name in names:
        measure(PARTS[name], TINY if sizes == "tiny" else FULL, Path(folder) / name)
        if device == "cuda":
            torch.cuda.synchronize()  # a device that a kernel broke stays broken: the next parts need a new process
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
