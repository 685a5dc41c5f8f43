"""The passes in their order. Both ways in that read a model, `backend.py` and `explicit.py`, come through here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import fx, nn

from pcr_fx.chain import NearMiss
from pcr_fx.graphs.attributes import attributes_of, values_of
from pcr_fx.graphs.memory import note_memory
from pcr_fx.node import SolveNode
from pcr_fx.options import Options
from pcr_fx.passes.collect import collect_states
from pcr_fx.passes.detect import find_chains
from pcr_fx.passes.normalise import normalise_graph
from pcr_fx.passes.plan import PlannedChain, plan_chains
from pcr_fx.passes.recurrent import replace_recurrent
from pcr_fx.passes.report import report_chains, report_recurrent
from pcr_fx.passes.rewrite import rewrite_chains
from pcr_fx.recurrent import Recurrent
from pcr_fx.reports import RewriteReport


class WayIn(Protocol):
    """What one way in does in its own manner.

    Attributes:
        root: the module whose attributes the graph reads.
        values: the tensors that the graph is given, by its inputs, as far as they are known.
        guards_sizes: whether it is only called with tensors of the sizes that it was captured with, where those are numbers.
    """

    guards_sizes: ClassVar[bool]

    @property
    def root(self) -> nn.Module: ...

    @property
    def values(self) -> Mapping[fx.Node, Any]: ...

    def capture(self) -> fx.Graph:
        """The model's graph: functions and methods only, all modules and marked regions written out."""

    def place(self, graph: fx.Graph, planned: Sequence[PlannedChain]) -> list[PlannedChain]:
        """The same chains, each with its solve node, or with none where the model's own ops are to stay."""

    def calls_modules(self, graph: fx.Graph) -> bool:
        """Whether a graph may call modules that no compiler looks into."""

    def stack(self, new: fx.Graph, operand: Sequence[fx.Node], copies: dict[fx.Node, fx.Node]) -> fx.Node:
        """Emit a per-block operand: see `rewrite_chains`."""


@dataclass(frozen=True, eq=False)
class Rewritten:
    """What the passes made of a model.

    Attributes:
        graph: the model's graph with solve nodes in it.
        nodes: these, by the names that the graph calls them by.
        planned: every chain, in the order of the graph, also those that keep the model's own ops.
        near_misses: what is no chain, and why.
        report: what a user is told.
        recurrent: PyTorch's recurrent networks, by the names that the graph calls them by.
    """

    graph: fx.Graph
    nodes: Mapping[str, SolveNode]
    planned: list[PlannedChain]
    near_misses: list[NearMiss]
    report: RewriteReport
    recurrent: Mapping[str, Recurrent]


def run_passes(way_in: WayIn, options: Options) -> Rewritten:
    """Capture, normalise, detect, plan, rewrite, collect, report."""
    graph = way_in.capture()
    note_memory({**way_in.values, **values_of(way_in.root, graph)})
    normalise_graph(graph)
    attributes = attributes_of(way_in.root, graph)
    detection = find_chains(graph, attributes, options.min_length, way_in.guards_sizes)
    planned, near_misses = plan_chains(graph, detection, attributes, options)
    planned = way_in.place(graph, planned)
    nodes = _named(planned)
    chains = [item.found for item in planned if item.node is not None]
    rewritten = rewrite_chains(graph, chains, list(nodes), way_in.stack)
    collect_states(rewritten, nodes)
    recurrent: dict[str, Recurrent] = {}
    if way_in.calls_modules(rewritten):
        recurrent, others = replace_recurrent(rewritten, options)
        near_misses += others
    near_misses.sort(key=lambda miss: -miss.length)
    report = report_chains(graph, planned, near_misses, options)
    report_recurrent(report, list(recurrent.values()), options)
    return Rewritten(rewritten, nodes, planned, near_misses, report, recurrent)


def _named(planned: Sequence[PlannedChain]) -> dict[str, SolveNode]:
    nodes = [item.node for item in planned if item.node is not None]
    return {f"pcr_fx_solve_{index}": node for index, node in enumerate(nodes)}
