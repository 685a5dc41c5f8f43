"""What MkDocs is told of this project: pages made of the repository's own files, and figures made of recorded benchmarks.

No figure of a benchmark is typed. In a page, `{{ NAME | ROW | COLUMN }}` is a cell of `benchmarks/results/NAME.json`, where ROW
is how its row begins, in one cell or more, and `{{ NAME }}` is the table of the record; the charts are drawn from the same files
while the site is built.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import charts  # MkDocs looks for it beside this file
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

PROJECT = Path(__file__).resolve().parents[2]
RESULTS = PROJECT / "benchmarks" / "results"
# Files of the repository that are pages as they are.
PAGES = {
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
_LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")
_FIGURE = re.compile(r"\{\{ *([^}]+?) *\}\}")


def on_files(files: Any, config: Any) -> Any:
    """Add the repository's own pages, the records of the benchmarks, and the charts."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=as_page((PROJECT / source).read_text())))
    names = sorted(path.stem for path in RESULTS.glob("*.md"))
    files.append(File.generated(config, "records/index.md", content=_index(names)))
    for name in names:
        files.append(File.generated(config, f"records/{name}.md", content=(RESULTS / f"{name}.md").read_text()))
    for picture in RESULTS.glob("*.png"):
        files.append(File.generated(config, f"records/{picture.name}", abs_src_path=str(picture)))
    for name, draw in charts.CHARTS.items():
        files.append(File.generated(config, f"records/{name}.svg", content=charts.svg(draw)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in the figures."""
    if page.file.src_uri in {*PAGES.values()} or page.file.src_uri.startswith("records/"):
        return markdown
    return _FIGURE.sub(lambda match: figure(*re.split(r" *\| *", match[1])), markdown)


def as_page(text: str) -> str:
    """A text of the repository's root, its links leading to pages of the site."""
    return _LINK.sub(lambda match: "](" + _page(match[1]), text)


def _page(path: str) -> str:
    if path in PAGES:
        return PAGES[path]
    if path == "README.md":
        return "index.md"
    found = re.fullmatch(r"benchmarks/results/([\w.]+)|docs/([\w./]+)", path)
    if found is None:
        raise PluginError(f"{path} is linked from a page of the site, and is no page of the site")
    return f"records/{found[1]}" if found[1] else found[2]


def figure(name: str, *cell: str) -> str:
    """A cell of a record, by what its row begins with and by its column; or all of the record as it was written.

    Raises:
        PluginError: there is no such record, row or column.
    """
    try:
        if not cell:
            return _body((RESULTS / f"{name}.md").read_text())
        *row, column = cell
        record = json.loads((RESULTS / f"{name}.json").read_text())
        cells = next(cells for cells in record["rows"] if [str(one) for one in cells[: len(row)]] == row)
        return str(cells[record["headers"].index(column)])
    except (OSError, ValueError, StopIteration) as error:
        raise PluginError(f"benchmarks/results has no {' | '.join((name, *cell))}") from error


def _body(text: str) -> str:
    """A record without its title."""
    return text.split("\n", 1)[1].strip()


def _index(names: list[str]) -> str:
    titles = {name: (RESULTS / f"{name}.md").read_text().split("\n", 1)[0].lstrip("# ") for name in names}
    rows = [f"- [{title}]({name}.md)" for name, title in titles.items()]
    return "# Records\n\nEach is a file in `benchmarks/results/`, as a benchmark wrote it.\n\n" + "\n".join(rows) + "\n"
