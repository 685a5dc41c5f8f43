"""`python -m pcr_fx plans`: the measurements that `solver="auto"` keeps on disk; `--clear` deletes them."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from pcr_fx.planner import Timing, cached_plans, clear_plans
from pcr_fx.planner.cache import plan_directory


def plan_table(plans: Sequence[dict[str, Any]]) -> str:
    """A row for each measurement, the fastest way first."""
    rows = []
    for plan in plans:
        chain, timings = plan["chain"], [Timing(**timing) for timing in plan["timings"]]
        ways = []
        for direction in ("forward", "backward"):
            measured = [t for t in timings if t.direction == direction and t.seconds is not None]
            measured.sort(key=lambda timing: timing.seconds or 0.0)
            ways.append("\n".join(textwrap.shorten(str(timing), 60) for timing in measured))
        size = f"{chain['length']} blocks, {chain['samples']} x {chain['dimension']}"
        rows.append((chain["modules"], chain["source"], f"{size}\n{chain['dtype']} on {chain['device']}", *ways))
    return tabulate(rows, ("chain", "source", "size", "forward", "backward"), "grid")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pcr_fx", description="What pcr_fx keeps on disk.")
    commands = parser.add_subparsers(dest="command", required=True)
    plans = commands.add_parser("plans", help='the measurements of solver="auto"')
    plans.add_argument("--clear", action="store_true", help="delete them; compiled kernels stay")
    if parser.parse_args(arguments).clear:
        print(f"{clear_plans()} measurements deleted from {plan_directory()}")
        return
    kept = cached_plans()
    print(f"{len(kept)} measurements in {plan_directory()}")
    if kept:
        print(plan_table(kept))


if __name__ == "__main__":
    main()
