"""Print the second zoo's table, in Markdown: `PYTHONPATH=.:tests python -m zoo.public [--only WORD] [--write]`."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import warnings
from datetime import date
from pathlib import Path

import torch
from tabulate import tabulate

from zoo.public import EXHIBITS
from zoo.public.look import WAYS, Look, look_at

RECORD = Path(__file__).parents[3] / "benchmarks" / "results" / "public_models.md"
HEADERS = ("model", *(f"{way}: {what}" for way in WAYS for what in ("chain", "forward, training", "first call")))
HEADERS += ("largest error", "remarks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models whose names have this word in them")
    parser.add_argument("--write", action="store_true", help=f"keep the table as {RECORD.name}")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows, found, absent = [], 0, []
    for exhibit in EXHIBITS:
        if given.only.lower() not in exhibit.name.lower():
            continue
        if not exhibit.is_here:
            absent.append(exhibit.package)
            continue
        looks = [look_at(exhibit, way) for way in WAYS]
        found += any(look.chain >= exhibit.least for look in looks)
        rows.append(
            (
                exhibit.name,
                *(part for look in looks for part in _cells(look)),
                f"{max(look.error for look in looks):.0e}",
                "; ".join(dict.fromkeys(look.words[:160] for look in looks if look.words)),
            )
        )
        print(tabulate(rows[-1:], tablefmt="github", disable_numparse=True).splitlines()[1], flush=True)
    words = f"Of {len(rows)} models the chain is found in {found}, by one way in at least."
    if absent:
        words += f" Not installed: {', '.join(dict.fromkeys(absent))}."
    print(f"\n{words}")
    if given.write:
        table = tabulate(rows, HEADERS, "github", disable_numparse=True)
        versions = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
        told = f"{date.today()}, {versions}, {os.cpu_count()} cores, one thread"
        told += "; times as fast as eager, minima of calls in turn."
        RECORD.write_text(f"# Models of other people\n\n{told}\n\n{table}\n\n{words}\n")


def _cells(look: Look) -> tuple[str, str, str]:
    if not look.chain:
        return "none", "", ""
    chain = f"{look.chain}, kernel" if look.kernel else f"{look.chain}"
    speeds = f"{look.forward:.1f}" + ("" if look.training is None else f", {look.training:.1f}")
    return chain, speeds, f"{look.first:.1f} s"


main()
