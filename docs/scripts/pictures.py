"""Draws the pictures of the site: those of pages, from what their code computed, and those of the method.

python docs/scripts/pictures.py                      # all of them, in about two minutes
python docs/scripts/pictures.py odes newton          # some
python docs/scripts/pictures.py --out /tmp/pictures  # elsewhere
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import method
import recipes
from charts import svg
from snippets import DOCS, run

# A picture's name, the page whose code computes what it shows, and what draws it.
OF_PAGES: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "start": ("index.md", recipes.start),
    **{
        name: (f"recipes/{name}.md", getattr(recipes, name))
        for name in ("recurrent", "odes", "spiking", "filters", "simulators", "diffusion", "deep")
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "names", nargs="*", help=f"of {', '.join([*method.PICTURES, *OF_PAGES])}; all, if none is given"
    )
    parser.add_argument("--out", type=Path, default=DOCS / "pictures")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.names or [*method.PICTURES, *OF_PAGES]:
        print(name, flush=True)
        draw = method.PICTURES[name] if name in method.PICTURES else _of_page(*OF_PAGES[name])
        (given.out / f"{name}.svg").write_text(svg(draw))


def _of_page(page: str, draw: Callable[[dict[str, Any]], Any]) -> Callable[[], Any]:
    names = run(DOCS / page)
    return lambda: draw(names)


if __name__ == "__main__":
    sys.exit(main())
