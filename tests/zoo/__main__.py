"""Print the zoo's table, in Markdown: `make zoo`, or `PYTHONPATH=.:tests python -m zoo`."""

from __future__ import annotations

import logging
import warnings

from tabulate import tabulate

from zoo.check import DIALECTS, examine
from zoo.models import EXHIBITS

HEADERS = ("model", "ops", "chains expected", *(f"found, {dialect}" for dialect in DIALECTS))
HEADERS += ("depth in chains", "largest error", "in gradients", "why the rest is not")


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = []
    for exhibit in EXHIBITS:
        seen = [examine(exhibit, dialect) for dialect in DIALECTS]
        row = [exhibit.name, seen[0].ops, _list(exhibit.chains), *(_list(each.chains) for each in seen)]
        row.append(f"{100 * seen[0].depth_in_chains / seen[0].depth:.0f} %")
        row += [f"{max(each.error for each in seen):.0e}", f"{max(each.gradient_error for each in seen):.0e}"]
        rows.append((*row, "; ".join(seen[0].reasons)))
    print(tabulate(rows, HEADERS, "github", disable_numparse=True))


def _list(lengths: tuple[int, ...]) -> str:
    return ", ".join(map(str, lengths)) or "none"


main()
