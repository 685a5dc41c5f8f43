"""A report as one HTML file: no network, no scripts, light and dark as the reader has it. All that it is given is escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from pcr_fx.planner import BESIDE
from pcr_fx.planner.choice import NO_WAYS
from pcr_fx.ways import in_units

_DIRECTIONS = ("forward", "backward")
# Boxes of blocks that are drawn of a chain, from its begin and from its end.
_FIRST, _LAST = 3, 1
# The smallest part of a row that a bar takes, in percent: some that are fast would not be seen.
_LEAST_SHARE = 0.6

_STYLE = """
.pcr-fx{--ink:#1f2328;--soft:#59636e;--page:#fff;--card:#f6f8fa;--line:#d1d9e0;--chain:#0969da;--bar:#54aeff;--best:#1a7f37;
--miss:#bc4c00;color:var(--ink);background:var(--page);font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:0 auto;
padding:1rem;box-sizing:border-box}
@media (prefers-color-scheme:dark){.pcr-fx{--ink:#e6edf3;--soft:#9198a1;--page:#0d1117;--card:#161b22;--line:#3d444d;
--chain:#58a6ff;--bar:#1f6feb;--best:#3fb950;--miss:#f0883e}}
.pcr-fx h1{font-size:1.35rem;margin:0 0 .2rem}.pcr-fx h2{font-size:1.1rem;margin:0}.pcr-fx h3{font-size:.95rem;margin:1rem 0 .3rem}
.pcr-fx section{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem 1rem;margin:1rem 0}
.pcr-fx p{margin:.3rem 0}.pcr-fx .soft{color:var(--soft)}.pcr-fx code{font:13px ui-monospace,monospace;overflow-wrap:anywhere}
.pcr-fx .blocks{display:flex;flex-wrap:wrap;align-items:center;gap:.4rem;margin:.6rem 0}
.pcr-fx .block{border:1.5px solid var(--chain);border-radius:6px;padding:.25rem .55rem;font:13px ui-monospace,monospace}
.pcr-fx .whole{border-width:2.5px;font-weight:600}
.pcr-fx dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;margin:.4rem 0}
.pcr-fx dt{color:var(--soft)}.pcr-fx dd{margin:0;overflow-wrap:anywhere}
.pcr-fx .way{display:grid;grid-template-columns:minmax(9rem,16rem) 1fr 6rem;gap:.6rem;align-items:center;margin:.15rem 0}
.pcr-fx .way b{text-align:right;font-weight:400}.pcr-fx .bar{height:.7rem;border-radius:3px;background:var(--bar);min-width:3px}
.pcr-fx .chosen .bar{background:var(--best)}.pcr-fx .chosen span{color:var(--best);font-weight:600}
.pcr-fx .miss{border-left:4px solid var(--miss);padding:.1rem 0 .1rem .7rem;margin:.6rem 0}
.pcr-fx .miss strong{color:var(--miss)}.pcr-fx ul{margin:.3rem 0;padding-left:1.2rem}
@media (max-width:40rem){.pcr-fx .way{grid-template-columns:1fr 5.5rem}.pcr-fx .way span{grid-column:1/-1}
.pcr-fx dl{grid-template-columns:1fr}}
"""
_PAGE = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    '<meta name="color-scheme" content="light dark"><title>pcr_fx: report</title>'
    "<style>html{{color-scheme:light dark}}body{{margin:0}}"
    "@media (prefers-color-scheme:dark){{body{{background:#0d1117}}}}</style></head>\n<body>{}</body></html>\n"
)


def page(report: Mapping[str, Any], headline: str) -> str:
    """A whole file: see `fragment`."""
    return _PAGE.format(fragment(report, headline))


def fragment(report: Mapping[str, Any], headline: str) -> str:
    """What a notebook shows.

    Args:
        report: as `RewriteReport.to_dict` has it.
        headline: what is to be said first.
    """
    parts = [f"<style>{_STYLE}</style>", f"<h1>{escape(headline)}</h1>"]
    parts += [_chain(number, entry) for number, entry in enumerate(report["chains"], 1)]
    parts += _misses(report["rejected"])
    parts += _listed("Outside of the graphs that torch.compile made", report["outside"])
    parts += _listed("Notes", report["notes"])
    return f'<div class="pcr-fx">{"".join(parts)}</div>'


def _chain(number: int, entry: Mapping[str, Any]) -> str:
    left = "" if entry["rewritten"] else ' <span class="soft">(found and left alone)</span>'
    title = f"<h2>Chain {number}: <code>{escape(entry['modules'])}</code>{left}</h2>"
    source = f'<p class="soft">{escape(entry["source"] or "source unknown")}</p>'
    return f'<section class="chain">{title}{source}{_drawing(entry)}{_facts(entry)}{"".join(_bars(entry))}</section>'


def _drawing(entry: Mapping[str, Any]) -> str:
    """The blocks as boxes, and the chain that stands for them."""
    length = entry["length"]
    shown = [*range(1, length + 1)]
    if length > _FIRST + _LAST + 1:
        shown = [*shown[:_FIRST], 0, *shown[-_LAST:]]
    body = escape(" > ".join(entry["body_ops"]))
    boxes = [f'<span class="block" title="{body}">{one}</span>' if one else "<span>…</span>" for one in shown]
    whole = f'<span class="block whole" title="{body}">{length} blocks in one</span>'
    return f'<div class="blocks">{"<span>→</span>".join(boxes)}<span>⇒</span>{whole}</div>'


def _facts(entry: Mapping[str, Any]) -> str:
    state = "known at the first call"
    if entry["state_shape"] is not None:
        state = f"{entry['state_shape']}, d = {entry['dimension']} per sample"
    after = entry["sequential_depth_after"]
    rows = {
        "body": " > ".join(entry["body_ops"]),
        "state": state,
        **{direction: _ran(entry, direction) for direction in _DIRECTIONS},
        "because": entry["reason"],
        "depth": f"{entry['sequential_depth_before']} → {'?' if after is None else after} steps one after another",
        "convergence": _convergence(entry),
        "fallbacks": f"{entry['fallbacks']} in {entry['calls']} calls"
        + (f": {entry['fallback_reason']}" if entry["fallback_reason"] else ""),
        "extra memory": in_units(entry["extra_memory_bytes"]),
        **{f"dim {dim} is coupled": reason for dim, reason in entry["coupled_dims"].items()},
    }
    return (
        f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>' for name, value in rows.items())}</dl>"
    )


def _ran(entry: Mapping[str, Any], direction: str) -> str:
    if entry["left_alone"]:
        return "the model's own ops"
    kernel = f" ({entry['kernel_kind']} kernel)" if entry[f"native_{direction}"] else ""
    return f"{entry[f'solver_{direction}']}{kernel}"


def _convergence(entry: Mapping[str, Any]) -> str:
    if entry["residual"] is None:
        return "not run yet"
    return f"{entry['iterations']} iterations to a residual of {entry['residual']:.1e}: {entry['outcome']}"


def _bars(entry: Mapping[str, Any]) -> Iterator[str]:
    """What each way costs, as bars of one scale a direction; what was not measured, with the reason."""
    for direction in _DIRECTIONS:
        those = [one for one in entry["timings"] if one["direction"] == direction and one["way"] not in NO_WAYS]
        beside = [one for one in entry["timings"] if one["direction"] == direction and one["way"] in BESIDE]
        timed = sorted((one for one in those if one["seconds"] is not None), key=lambda one: one["seconds"])
        if not those:
            continue
        longest = max((one["seconds"] for one in timed), default=0.0)
        yield f"<h3>{direction.capitalize()}: what each way takes</h3>"
        chosen = entry[f"way_{direction}"]
        yield from (_bar(one, longest, one["way"] == chosen) for one in timed)
        others = [f"{one['way']}: {one['note']}" for one in those if one["seconds"] is None]
        others += [
            f"{one['way']}, {BESIDE[one['way']]}: {_milliseconds(one['seconds'])}" for one in beside if one["seconds"]
        ]
        if others:
            yield f'<ul class="soft">{"".join(f"<li>{escape(one)}</li>" for one in others)}</ul>'


def _bar(timing: Mapping[str, Any], longest: float, is_chosen: bool) -> str:
    share = max(100 * timing["seconds"] / longest if longest else 0.0, _LEAST_SHARE)
    kind = "way chosen" if is_chosen else "way"
    note = f' title="{escape(timing["note"])}"' if timing["note"] else ""
    return (
        f'<div class="{kind}"{note}><span>{escape(timing["way"])}</span>'
        f'<div><div class="bar" style="width:{share:.1f}%"></div></div><b>{_milliseconds(timing["seconds"])}</b></div>'
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _misses(rejected: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not rejected:
        return
    yield "<section><h2>Not parallelised</h2>"
    for miss in rejected:
        blocks = f", {miss['length']} blocks" if miss["length"] else ""
        source = f' <span class="soft">{escape(miss["source"])}</span>' if miss["source"] else ""
        where = f"<strong><code>{escape(miss['modules'])}</code></strong>{blocks}{source}"
        yield f'<div class="miss">{where}<p>{escape(miss["reason"])}</p></div>'
    yield "</section>"


def _listed(title: str, items: Sequence[str]) -> Iterator[str]:
    if items:
        yield f"<section><h2>{title}</h2><ul>{''.join(f'<li>{escape(one)}</li>' for one in items)}</ul></section>"
