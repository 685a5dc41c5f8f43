"""Draws models, and compares ways to run them with eager, until the time is over: `python -m tests.fuzz --minutes 30 --seed 1`.

What it finds is cut down to a small script, which it prints. It ends with an error if it found anything.

`--sanitize` compiles kernels with AddressSanitizer and UBSan, and runs all cases by them in a process of its own.
"""

from __future__ import annotations

import argparse
import collections
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("PCR_FX_CHECK", "1")
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize=vptr", "-O1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--cases", type=int, default=10**9, help="end after so many calls of models")
    parser.add_argument("--seed", type=int, default=0, help="of the first model; the next ones follow")
    parser.add_argument("--kernels", type=float, default=0.01, help="the share of cases that compile native code")
    parser.add_argument(
        "--bodies", action="store_true", help="models with what people write inside a block, of bodies.py"
    )
    parser.add_argument("--sanitize", action="store_true")
    given = parser.parse_args()
    if given.sanitize and "PCR_FX_SANITIZED" not in os.environ:
        sys.exit(_sanitized())
    sys.exit(fuzz(given))


def fuzz(given: argparse.Namespace) -> int:
    """How many models were found to be wrong or to crash."""
    from fuzz.cases import draw, draw_body
    from fuzz.run import Call, draw_calls, judge
    from fuzz.shrink import script, shrink
    from pcr_fx.targets.cpp import build

    logging.disable(logging.WARNING)
    if given.sanitize:
        build._FLAGS += _SANITIZERS
    counts: collections.Counter[str] = collections.Counter()
    until, seed = time.monotonic() + 60 * given.minutes, given.seed
    while time.monotonic() < until and counts["cases"] < given.cases:
        case, seen = draw_body(seed) if given.bodies else draw(seed), set[str]()
        by_kernel = [Call("transform", "kernel"), Call("transform", "kernel newton")][: 1 + seed % 2]
        for call in by_kernel if given.sanitize else draw_calls(case, given.kernels):
            print(f"seed {seed}: {call}", file=sys.stderr, flush=True) if given.sanitize else None
            verdict = judge(case, call)
            if verdict.kind == "refused":
                counts["refused"] += 1
                continue
            counts["cases"] += 1
            counts[verdict.kind] += 1
            counts[f"by {call.way_in}, {call.solver}"] += 1
            counts["with a chain"] += bool(verdict.chains)
            counts["with a chain that has a kernel"] += bool(verdict.kernels)
            if verdict.kind != "right" and verdict.words[:60] not in seen:  # most calls of a model fail alike
                seen.add(verdict.words[:60])
                small = shrink(case, call, verdict)
                print(script(small, call, judge(small, call)), flush=True)
        seed += 1
        if seed % 100 == 0:
            print(f"up to seed {seed}: {dict(counts)}", file=sys.stderr, flush=True)
    print(f"seeds {given.seed} to {seed - 1}")
    for name, count in sorted(counts.items()):
        print(f"{count:7} {name}")
    return counts["wrong"] + counts["crashed"]


def _sanitized() -> int:
    """The same in a process that the sanitizers' library is loaded into first."""
    compiler = os.environ.get("CXX", "g++")
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    # Python itself leaks, and PyTorch makes its own use of memory that looks like one.
    options = {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    environment = {**os.environ, **options, "LD_PRELOAD": ":".join(libraries), "PCR_FX_SANITIZED": "1"}
    return subprocess.run([sys.executable, "-m", "tests.fuzz", *sys.argv[1:]], env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    main()
