"""What the documentation shows: its code runs, its figures are those that were recorded, its pages are all there."""

import importlib
import json
import re
import runpy
from pathlib import Path

import pytest
import torch

import pcr_fx
from docs.scripts import snippets

PROJECT = Path(__file__).parents[1]
START = snippets.DOCS / "index.md"
CODE = [page for page in snippets.pages() if page != START]  # which is run as a notebook


@pytest.mark.parametrize("page", CODE, ids=[str(page.relative_to(snippets.DOCS)) for page in CODE])
def test_the_code_of_a_page_runs(page: Path, fresh_compiler: None, kernel_cache: None) -> None:
    pytest.importorskip("matplotlib").use("agg")
    config = torch._dynamo.config
    with config.patch(
        use_recursive_dict_tags_for_guards=config.use_recursive_dict_tags_for_guards
    ):  # which a page sets
        snippets.run(page)


def test_lines_of_code_are_where_the_page_has_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Words.\n\n```python\na = 1\n```\n\n```text\nnot code\n```\n\n```python\nb = a + 1\n```\n")
    lines = snippets.script(page).splitlines()
    assert (lines[3], lines[11]) == ("a = 1", "b = a + 1") and not any(lines[4:11])
    assert snippets.run(page)["b"] == 2


def test_the_notebook_is_the_start_page_and_runs(tmp_path: Path, kernel_cache: None) -> None:
    pytest.importorskip("matplotlib").use("agg")
    cells = runpy.run_path(str(snippets.DOCS / "scripts" / "notebook.py"))["cells"](START.read_text())
    kept = json.loads((snippets.DOCS / "start.ipynb").read_text())["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in kept] == cells, "run docs/scripts/notebook.py"
    page = tmp_path / "start.md"
    page.write_text("".join(f"```python\n{code}\n```\n" for kind, code in cells if kind == "code"))
    assert snippets.run(page)["losses"].lines  # the notebook's own picture


def test_all_that_is_public_is_in_the_reference() -> None:
    named = re.findall(r"^::: pcr_fx\.(\w+)$", (snippets.DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(pcr_fx.__all__)


def test_all_options_are_in_the_table() -> None:
    rows = re.findall(r"^\| `([a-z_]+)` \|", (snippets.DOCS / "options.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(pcr_fx.Options.__dataclass_fields__)


def test_figures_in_the_readme_were_recorded() -> None:
    """The table of the README, cell by cell against `benchmarks/results/kernels.json`."""
    record = json.loads((PROJECT / "benchmarks" / "results" / "kernels.json").read_text())
    recorded = {row[0]: dict(zip(record["headers"], row, strict=True)) for row in record["rows"]}
    text = (PROJECT / "README.md").read_text()
    header, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|") and not line.startswith("|-")
    ]
    keys = {
        "`transform(..., pack_parameters=True)`": "packed against eager",
        "`transform`": "unpacked against eager",
        "`torch.compile`": "`torch.compile` against eager",
    }
    assert len(rows) == 2 * len(keys)
    for row in rows:
        way, direction = row[0].rsplit(", ", 1)
        for size, cell in zip(header[1:], row[1:], strict=True):
            gain = float(recorded[f"{keys[way]}, {direction}"][size].split("x")[0])
            assert cell == (f"{gain:.0f}x" if gain >= 10 else f"{gain:.1f}x"), (row[0], size)


def test_links_in_the_repository_lead_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "SECURITY.md", "CHANGELOG.md"):
        for link in re.findall(r"\]\((?!https?://)([^)#\s]+)", (PROJECT / name).read_text()):
            assert (PROJECT / link).exists(), f"{name}: {link}"


@pytest.mark.parametrize("kind", ["contractive", "residual blocks", "chaotic"])
def test_pictures_of_the_method_show_what_newton_does(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each iteration makes at least one more block right, and all of them are after as many as there are."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(snippets.DOCS / "scripts")
    method = importlib.import_module("method")
    weights, x0 = method._chain(12)
    residuals = method.iterate(method.KINDS[kind], weights, x0, "newton", 13)
    for iteration, row in enumerate(residuals):
        assert (row[:iteration] < 1e-14).all()
