"""What pcr_fx did to a model, and what it would do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from pcr_fx.backend import last_report, rewrite_captured
from pcr_fx.chain import NearMiss
from pcr_fx.compilations import kept
from pcr_fx.errors import PcrFxError, UnsupportedError
from pcr_fx.explicit import TransformedModule
from pcr_fx.options import Options
from pcr_fx.reports import ChainEntry, RewriteReport
from pcr_fx.steps import Captures, latest_of


def report(target: TransformedModule | Callable[..., Any] | None = None) -> RewriteReport:
    """The report of a transformed module, of a step that `pcr_fx.scan` ran, or of the last `torch.compile` with this backend.

    Raises:
        PcrFxError: nothing was compiled yet.
        UnsupportedError: `target` is something else.
    """
    if isinstance(target, TransformedModule):
        return TransformedModule.report.fget(target)  # type: ignore[attr-defined, no-any-return]
    if target is not None:
        found = latest_of(target) if callable(target) else []
        if found:
            return _report_of_loops(found)
        raise UnsupportedError(
            f"report takes what pcr_fx.transform returned, or a step that pcr_fx.scan ran, got {type(target).__name__}; "
            "report() without an argument is about the last torch.compile"
        )
    last = last_report()
    if last is None:
        raise PcrFxError(
            'nothing was compiled with backend="deeppcr" yet; torch.compile compiles at the first call of the model'
        )
    return last


def _report_of_loops(found: Sequence[Captures]) -> RewriteReport:
    """What became of a step, for each form of arguments that it was called with."""
    report = RewriteReport()
    loops = dict.fromkeys(loop for one in found if one.latest is not None for loop in one.latest.loops.values())
    report.chains = [
        ChainEntry(loop.chain if loop.node is None else loop.node.chain, loop.options, node=loop.node) for loop in loops
    ]
    report.rejected = [NearMiss(one.name, one.failure, source=one.source) for one in found if one.failure]
    report.nodes = report.depth = report.depth_in_chains = sum(len(loop.chain.origin.ops) for loop in loops)
    return report


def explain(model: Callable[..., Any], *args: Any, options: Any = None, **kwargs: Any) -> RewriteReport:
    """What `torch.compile(model, backend="deeppcr")` would do for these arguments, without doing it.

    The model is traced, and run once as it is.

    Args:
        model: a module or a function.
        options: an `Options`, or a dict of its fields.

    Raises:
        UnsupportedError: `model` is something else.
    """
    if not callable(model):
        raise UnsupportedError(f"explain takes a module or a function, got {type(model).__name__}")
    settings = Options.of(options)

    def explain_graph(graph_module: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        untouched = fx.Graph()
        untouched.output(untouched.graph_copy(graph_module.graph, {}))
        compilations.add(rewrite_captured(fx.GraphModule(graph_module, untouched), example_inputs, settings)[0])
        return graph_module.forward

    with kept(explain_graph) as compilations:
        torch.compile(model, backend=explain_graph)(*args, **kwargs)
    return compilations.merged() or RewriteReport()
