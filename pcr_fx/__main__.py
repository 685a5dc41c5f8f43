"""The command line: `python -m pcr_fx doctor`, `kernels`, `plans`, `repro`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import runpy
import sys
import textwrap
import time
import traceback
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from pcr_fx import disk, doctor
from pcr_fx.errors import PcrFxError, UnsupportedError
from pcr_fx.node import SolveNode, nodes_made
from pcr_fx.planner import Plan, Timing, cached_plans, clear_plans
from pcr_fx.planner.cache import plan_directory
from pcr_fx.reproduction import script_of
from pcr_fx.targets.cpp import kept
from pcr_fx.ways import in_units

# Exit statuses: something is broken, or cannot be done.
_BROKEN, _REFUSED = 1, 2


def _doctor(arguments: argparse.Namespace) -> int:
    findings = doctor.examine()
    is_well = doctor.is_well(findings)
    if arguments.json:
        print(json.dumps({"is_well": is_well, "findings": [one.to_dict() for one in findings]}, indent=1))
    else:
        print(doctor.as_table(findings))
    return 0 if is_well else _BROKEN


# --- kernels --------------------------------------------------------------------------------------------------------------


def _list_kernels(_: argparse.Namespace) -> int:
    kernels = kept.kept_kernels()
    print(f"{len(kernels)} kernels, {in_units(sum(one.size for one in kernels))}, in {disk.cache_directory()}")
    if kernels:
        rows = [(one.key, _day(one.made), in_units(one.size), one.what) for one in kernels]
        print(tabulate(rows, ("key", "compiled", "size", "what"), "simple", disable_numparse=True))
    return 0


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _show_kernel(arguments: argparse.Namespace) -> int:
    print(kept.kernel_source(arguments.key))
    return 0


def _clear_kernels(_: argparse.Namespace) -> int:
    count, size = kept.clear_kernels()
    print(f"{count} kernels deleted from {disk.cache_directory()}, {in_units(size)}")
    return 0


# --- plans ----------------------------------------------------------------------------------------------------------------


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


def _plans(arguments: argparse.Namespace) -> int:
    if arguments.clear:
        print(f"{clear_plans()} measurements deleted from {plan_directory()}")
        return 0
    plans = cached_plans()
    print(f"{len(plans)} measurements in {plan_directory()}")
    if plans:
        print(plan_table(plans))
    return 0


# --- repro ----------------------------------------------------------------------------------------------------------------


def _repro(arguments: argparse.Namespace) -> int:
    nodes = _planned(_run_script(arguments.script, arguments.arguments))
    if not 1 <= arguments.chain <= len(nodes):
        raise UnsupportedError(
            f"--chain must be one of the {len(nodes)} chains that {arguments.script} ran, got {arguments.chain}"
        )
    for number, node in enumerate(nodes, 1):
        chosen = "this one" if number == arguments.chain else f"--chain {number}"
        print(f"{node.chain.length} blocks of {node.record.name}: {chosen}", file=sys.stderr)
    node = nodes[arguments.chain - 1]
    print(script_of(node.chain, node.outcome, node.options), end="")
    return 0


def _run_script(script: str, arguments: Sequence[str]) -> list[SolveNode]:
    """The solve nodes that a script makes; it may end with an error, which may be what there is to report."""
    argv, path = list(sys.argv), list(sys.path)
    with nodes_made() as nodes, contextlib.redirect_stdout(sys.stderr):
        sys.argv[:], sys.path[:0] = [script, *arguments], [os.path.dirname(os.path.abspath(script))]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit:
            pass
        except OSError:
            raise
        except Exception:
            traceback.print_exc()
        finally:
            sys.argv[:], sys.path[:] = argv, path
    return nodes


def _planned(nodes: Sequence[SolveNode]) -> list[SolveNode]:
    """Those whose shapes are known, one of each chain, the longest first."""
    found: dict[tuple[str, int], SolveNode] = {}
    for node in nodes:
        if isinstance(node.outcome, Plan):
            found.setdefault((node.outcome.program.key, node.chain.length), node)
    return sorted(found.values(), key=lambda node: -node.chain.length)


# --- the command line -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pcr_fx", description="What pcr_fx has, and keeps on disk.")
    commands = parser.add_subparsers(dest="command", required=True)

    found = commands.add_parser("doctor", help="what is there, what of it works, and what to do about the rest")
    found.add_argument("--json", action="store_true", help="for programs")
    found.set_defaults(run=_doctor)

    kernels = commands.add_parser("kernels", help="the compiled kernels that are kept on disk")
    what = kernels.add_subparsers(dest="what", required=True)
    what.add_parser("list", help="all of them, the oldest first").set_defaults(run=_list_kernels)
    show = what.add_parser("show", help="the C++ source of one")
    show.add_argument("key", help="how its key begins")
    show.set_defaults(run=_show_kernel)
    what.add_parser("clear", help="delete all; measurements stay").set_defaults(run=_clear_kernels)

    plans = commands.add_parser("plans", help='the measurements of solver="auto" that are kept on disk')
    plans.add_argument("--clear", action="store_true", help="delete them; compiled kernels stay")
    plans.set_defaults(run=_plans)

    repro = commands.add_parser("repro", help="a chain of a script of yours as one script for a bug report, printed")
    repro.add_argument("--chain", type=int, default=1, help="which, the longest first")
    repro.add_argument("script", help="what to run")
    repro.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    repro.set_defaults(run=_repro)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, 1 where something is broken, 2 where something cannot be done.
    """
    given = _parser().parse_args(arguments)
    try:
        status: int = given.run(given)
        return status
    except (PcrFxError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return _REFUSED


if __name__ == "__main__":
    sys.exit(main())
