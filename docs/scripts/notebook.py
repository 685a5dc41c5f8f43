"""Makes `docs/start.ipynb` of the start page: python docs/scripts/notebook.py. The notebook is run, and keeps what it printed.

Needs nbformat, nbclient and ipykernel, which `pip install '.[docs]'` brings.
"""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
_CODE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_PICTURE = re.compile(r"^!\[[^\]]*\]\(pictures/start\.svg\)$", re.MULTILINE)
# In the place of the page's picture, which was drawn of the same numbers.
_DRAW = """\
import matplotlib.pyplot as plt

figure, (losses, seconds) = plt.subplots(1, 2, figsize=(9, 2.8))
losses.plot(plain_losses, linewidth=5, alpha=0.5, label="as it is")
losses.plot(fast_losses, label="with pcr_fx")
losses.legend()
seconds.semilogy(plain_seconds, ".-")
seconds.semilogy(fast_seconds, ".-")
seconds.set(xlabel="training step", ylabel="seconds");"""


def cells(page: str) -> list[tuple[str, str]]:
    """The kind and the source of each cell: a page's words and its code by turns."""
    found = []
    for index, part in enumerate(_CODE.split(_PICTURE.sub(f"```python\n{_DRAW}\n```", page))):
        text = part.strip()
        if text:
            found.append(("code" if index % 2 else "markdown", text if index % 2 else _local(text)))
    return found


def _local(words: str) -> str:
    """Links to pages lead to their files, beside the notebook; those of the site alone are words."""
    return re.sub(r"\[([^\]]+)\]\(contributing\.md\)", r"[\1](../CONTRIBUTING.md)", words)


def main() -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook()
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for number, (kind, source) in enumerate(cells((DOCS / "index.md").read_text())):
        make = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
        notebook.cells.append(make(source, id=f"cell-{number}"))
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
    nbformat.write(notebook, DOCS / "start.ipynb")


if __name__ == "__main__":
    main()
