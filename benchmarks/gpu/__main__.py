"""The fused kernels on a GPU: the CUDA tests, then every figure that they have to reach.

    PYTHONPATH=. python -m benchmarks.gpu [--output DIR] [--parts NAME...] [--skip-tests] [--dry-run]

Takes less than eight minutes, and needs a CUDA GPU, Triton, pytest for the tests and matplotlib for pictures; no network.
Writes `gpu.md`, `gpu.json` and pictures after every part; what fails, hangs or takes too long is said there, and the rest
goes on. `--dry-run` goes through every part at tiny sizes, in Triton's interpreter where there is no GPU, and records
nothing.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu.pictures import draw
from benchmarks.gpu.record import Record, Section
from benchmarks.gpu.sections import PARTS
from benchmarks.gpu.subprocesses import run_tests, start
from benchmarks.measure import RESULTS

TEST_SECONDS = 110.0
# Beyond a part's own time: for a figure that began in it, and for starting the process.
GRACE_SECONDS = 40.0
TOTAL_SECONDS = 460.0


def run(record: Record, names: list[str], sizes: str, until: float) -> None:
    """Measure parts in a process; a new one where it hangs or dies."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while names and time.monotonic() < until:
            for done in _measured(folder, list(names), sizes, until):
                section = _read(folder / done) or Section(PARTS[done].title)
                if not section.ended:
                    section.problems.append("its process hung or died, or time was up")
                    section.notes += PARTS[done].summary(section)
                names = names[names.index(done) + 1 :]
                _take(record, done, section)
        for left in names:
            _take(record, left, Section(PARTS[left].title, problems=["no time was left"]))


def _measured(folder: Path, names: list[str], sizes: str, until: float) -> Iterator[str]:
    """The parts that one process gets through, as it does; the last may be one that it did not."""
    process = start("-m", "benchmarks.gpu.worker", str(folder), sizes, *names)
    for name in names:
        limit = min(until, time.monotonic() + PARTS[name].seconds + GRACE_SECONDS)
        while process.poll() is None and not _has_ended(folder / name) and time.monotonic() < limit:
            time.sleep(0.1)
        if not _has_ended(folder / name):
            process.kill()
            process.wait()
            yield name
            return
        yield name
    process.wait()


def _read(file: Path) -> Section | None:
    return pickle.loads(file.read_bytes()) if file.exists() else None


def _has_ended(file: Path) -> bool:
    section = _read(file)
    return section is not None and section.ended


def _take(record: Record, name: str, section: Section) -> None:
    print(section, end="\n\n", flush=True)
    if record.folder is not None:
        draw(name, section, record.folder)
    record.sections.append(section)
    record.write()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.dry_run:
        sys.exit("there is no CUDA GPU; --dry-run goes through the motions without one")
    until = time.monotonic() + TOTAL_SECONDS
    record = Record(None if arguments.dry_run else arguments.output)
    if not arguments.skip_tests and not arguments.dry_run:
        notes = run_tests(TEST_SECONDS)
        _take(record, "tests", Section("CUDA tests", notes=[f"- {line}" for line in notes], ended=True))
    run(record, arguments.parts, "tiny" if arguments.dry_run else "full", until)
    print("A dry run: no number above means anything." if arguments.dry_run else f"Written to {arguments.output}.")
    return any(section.problems for section in record.sections)


if __name__ == "__main__":
    sys.exit(main())
