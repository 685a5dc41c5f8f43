"""The report as a page: whole, with all that the report has, nothing from elsewhere, and all of it escaped."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ResidualNet, plain_mlp
from torch import nn

import pcr_fx
from pcr_fx.chain import NearMiss
from pcr_fx.pages import fragment
from pcr_fx.planner import Timing

EVIL = "<script>alert('&\"')</script>"
VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """Reads a page as strictly as a browser would be lenient.

    Attributes:
        tags: all tags with their attributes.
        text: what is to be read.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"{self.open} are not closed"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.tags if name in (attributes.get("class") or "").split()]


@pytest.fixture(scope="module")
def report() -> pcr_fx.RewriteReport:
    torch.manual_seed(0)
    x = torch.randn(4, 3)
    fast = pcr_fx.transform(nn.Sequential(ResidualNet(20), plain_mlp(5, 2)), x, {"kernels": False, "solver": "newton"})
    fast(x)
    return pcr_fx.report(fast)


def test_a_page_has_what_the_report_has_and_nothing_from_elsewhere(
    report: pcr_fx.RewriteReport, tmp_path: Path
) -> None:
    report.save(tmp_path / "report.html")
    written = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(written)
    assert written.startswith("<!doctype html>") and "prefers-color-scheme:dark" in written
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not {"src", "href", "onclick"} & {name for _, attributes in page.tags for name in attributes}
    assert "http" not in written and "url(" not in written and "@import" not in written
    (entry,) = report.to_dict()["chains"]
    (miss,) = report.to_dict()["rejected"]
    for words in ("1 chain", entry["modules"], entry["source"], "20 blocks in one", " > ".join(entry["body_ops"])):
        assert words in page.text
    for words in ("d = 4 per sample", "newton", entry["outcome"], miss["modules"], miss["reason"], miss["source"]):
        assert words in page.text
    assert [one["title"] for one in page.of_class("block")] == [" > ".join(entry["body_ops"])] * 5
    assert len(page.of_class("miss")) == 1


def test_a_notebook_shows_a_part_of_a_page(report: pcr_fx.RewriteReport) -> None:
    shown = report._repr_html_()
    assert shown.startswith('<div class="pcr-fx">') and shown.endswith("</div>") and "<body" not in shown
    assert "Chain 1" in Page(shown).text


def test_ways_are_bars_of_one_scale_and_the_chosen_one_is_marked(report: pcr_fx.RewriteReport) -> None:
    said = report.to_dict()
    timings = [
        Timing("newton", "forward", 0.004, 3),
        Timing("eager", "forward", 0.001),
        Timing("jacobi", "forward", None, note="never & ever"),
        Timing("stacking operands", "forward", 0.0005),
    ]
    entry = {**said["chains"][0], "timings": [vars(one) for one in timings], "way_forward": "newton"}
    page = Page(fragment({**said, "chains": [entry]}, "headline"))
    assert [one["style"] for one in page.of_class("bar")] == ["width:25.0%", "width:100.0%"]
    assert len(page.of_class("chosen")) == 1 and len(page.of_class("way")) == 2
    assert page.text.index("eager") < page.text.index("4 ms") and "jacobi: never & ever" in page.text
    assert "stacking operands, for all but eager" in page.text


def test_everything_is_escaped(report: pcr_fx.RewriteReport) -> None:
    said = report.to_dict()
    timing = vars(Timing(EVIL, "forward", 1.0, note=EVIL))
    entry = said["chains"][0] | dict.fromkeys(("modules", "source", "reason", "outcome", "fallback_reason"), EVIL)
    entry |= {"body_ops": [EVIL], "coupled_dims": {EVIL: EVIL}, "timings": [timing, timing | {"seconds": None}]}
    miss = vars(replace(NearMiss("", ""), modules=EVIL, reason=EVIL, source=EVIL))
    shown = fragment({"chains": [entry], "rejected": [miss], "outside": [EVIL], "notes": [EVIL]}, EVIL)
    page = Page(shown)
    assert "script" not in {tag for tag, _ in page.tags} and "<script" not in shown
    assert page.text.count(EVIL) >= 14
    assert all(one["title"] == EVIL for one in page.of_class("block") + page.of_class("way"))


def test_a_report_without_a_chain_is_a_page() -> None:
    assert "NO CHAIN FOUND" in Page(pcr_fx.RewriteReport()._repr_html_()).text


@pytest.mark.parametrize("length", [8, 2])
def test_short_chains_have_a_box_for_each_block(length: int, report: pcr_fx.RewriteReport) -> None:
    said = report.to_dict()
    page = Page(fragment({**said, "chains": [{**said["chains"][0], "length": length}]}, ""))
    assert len(page.of_class("block")) == (5 if length == 8 else 3)


def test_a_summary_has_a_line_for_each_chain(report: pcr_fx.RewriteReport, monkeypatch: pytest.MonkeyPatch) -> None:
    headline, chain, miss = report.summary().splitlines()
    (entry,) = report.to_dict()["chains"]
    assert headline == str(report).splitlines()[0]
    assert chain == f"1. {entry['modules']}: 20 blocks, d = 4; forward newton, backward newton"
    assert miss == f"not {report.rejected[0].modules}: {report.rejected[0].reason}"
    timings = [vars(Timing("newton", "forward", 0.002)), vars(Timing("eager", "forward", 0.003))]
    measured = {**entry, "timings": timings}
    monkeypatch.setattr("pcr_fx.reports.ChainEntry.to_dict", lambda self: measured)
    assert report.summary().splitlines()[1].endswith("forward newton 1.5x, backward newton")
    measured["left_alone"] = True
    assert report.summary().splitlines()[1].endswith("forward the model's own ops, backward the model's own ops")
