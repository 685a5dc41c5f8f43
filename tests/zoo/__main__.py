"""Print the zoo's table, in Markdown: `python -m zoo` with tests/ on the path, or `make zoo`."""

from __future__ import annotations

import logging
import warnings

from tabulate import tabulate

from zoo.check import DIALECTS, examine
from zoo.models import EXHIBITS

HEADERS = ("model", "graph by", "ops", "chains expected", "found", "depth in chains", "error", "gradient error", "not")


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = []
    for exhibit in EXHIBITS:
        for dialect in DIALECTS:
            seen = examine(exhibit, dialect)
            share = f"{100 * seen.depth_in_chains / seen.depth:.0f} %"
            row = (exhibit.name, dialect, seen.ops, _list(exhibit.chains), _list(seen.chains), share)
            rows.append((*row, f"{seen.error:.0e}", f"{seen.gradient_error:.0e}", "; ".join(seen.reasons)))
    print(tabulate(rows, HEADERS, "github", disable_numparse=True))


def _list(lengths: tuple[int, ...]) -> str:
    return ", ".join(map(str, lengths)) or "none"


main()
