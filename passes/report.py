"""Say what became of each chain and each near miss."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import fx

from pcr_fx.chain import NearMiss
from pcr_fx.options import Options
from pcr_fx.passes.plan import PlannedChain
from pcr_fx.passes.rewrite import depth
from pcr_fx.recurrent import Recurrent
from pcr_fx.reports import ChainEntry, RewriteReport
from pcr_fx.switches import OFF

log = logging.getLogger(__name__)


def report_chains(
    graph: fx.Graph, planned: Sequence[PlannedChain], near_misses: Sequence[NearMiss], options: Options
) -> RewriteReport:
    """The report of one rewrite of `graph`, which is the graph that the chains were found in."""
    entries = [
        ChainEntry(item.found.chain, options, item.plan or item.refusal, item.choice, item.node, set(item.parameters))
        for item in planned
    ]
    ops = sum(node.op.startswith("call_") for node in graph.nodes)
    report = RewriteReport(entries, list(near_misses), *depth(graph, [item.found for item in planned]), ops)
    log.debug("%s", report)
    return report


def report_recurrent(report: RewriteReport, networks: Sequence[Recurrent], options: Options) -> None:
    """Add the chains of recurrent networks, each of which is one op of the graph."""
    for network in networks:
        for layer in network.layers:
            node = next(iter(layer.nodes.values()))
            entry = ChainEntry(node.chain, options, node=node)
            layer.followers.append(entry)
            report.chains.append(entry)
        steps = network.form.num_layers * node.chain.length
        report.depth, report.depth_in_chains = report.depth + steps - 1, report.depth_in_chains + steps


def warn_without_chains(report: RewriteReport, reason: str = "") -> None:
    """Say loudly that nothing was found, and the reason for it: by default the first in the report."""
    if report.is_off:
        log.warning("%s", OFF)
    elif not report.chains:
        first = next(iter(report.rejected), None)
        reason = reason or ("nothing in it repeats" if first is None else f"{first.modules}: {first.reason}")
        log.warning("no chain found in %d ops; the model runs as it was (%s)", report.nodes, reason)
