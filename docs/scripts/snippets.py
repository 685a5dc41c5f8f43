"""The Python code on the site's pages: what a page shows is run as one script, from top to bottom.

python docs/scripts/snippets.py docs/recipes/odes.md     # run a page's code
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"^```python\b[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def pages() -> list[Path]:
    """The pages that show Python code."""
    return [page for page in sorted(DOCS.rglob("*.md")) if _BLOCK.search(page.read_text())]


def script(page: Path) -> str:
    """A page's code, each line where the page has it, so that errors name the page's lines."""
    text = page.read_text()
    lines = [""] * text.count("\n")
    for block in _BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1))
        code = block[1].splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines)


def run(page: Path) -> dict[str, Any]:
    """What is defined once the page's code has run, as a module: Dynamo looks for what code reads in its module."""
    module = ModuleType(f"page_{page.stem}")
    module.__file__ = str(page)
    sys.modules[module.__name__] = module
    exec(compile(script(page), str(page), "exec"), module.__dict__)
    return vars(module)


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        run(page.resolve())
