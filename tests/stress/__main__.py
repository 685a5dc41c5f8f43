"""Run it all, or a part: `make stress`, or `PYTHONPATH=.:tests python -m stress [interrupts calls kills processes] [--count N]`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile

from stress import interrupts, processes, threads

# How many of each, and what runs them.
PARTS = {
    "interrupts": (200, lambda count, seed: interrupts.run(count, seed)),
    "calls": (10_000, lambda count, seed: threads.run(count)),
    "processes": (8, lambda count, seed: processes.at_once(count)),
    "kills": (50, lambda count, seed: processes.killed(count, seed)),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m stress", description=sys.modules["stress"].__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"which of {', '.join(PARTS)}; all, if none is named")
    parser.add_argument("--count", type=int, help="how many interrupts, calls, processes or kills")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    given = parser.parse_args()
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    interrupts.be_interruptible()
    troubles = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PCR_FX_CACHE_DIR"] = folder
        for part in given.parts or PARTS:
            count, run = PARTS[part]
            troubles += run(given.count or count, given.seed)
    print(*troubles, sep="\n")
    return bool(troubles)


sys.exit(main())
