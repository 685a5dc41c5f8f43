"""How long detection takes against the size of the graph: `python -m benchmarks.detection`."""

from __future__ import annotations

import gc
import random
import time

import torch
from torch import fx

from benchmarks.measure import record
from benchmarks.models import residual_net
from pcr_fx.graphs.attributes import attributes_of
from pcr_fx.passes.capture import capture_model
from pcr_fx.passes.detect import find_chains
from pcr_fx.passes.normalise import normalise_graph
from pcr_fx.passes.rewrite import sortable_chains


def blocks(ops: int) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
    """Residual blocks of five ops."""
    model = residual_net(ops // 5, 4)
    graph = capture_model(model, torch.randn(2, 4)).graph
    normalise_graph(graph)
    return graph, attributes_of(model, graph)


def random_ops(ops: int) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
    """No chain at all: ops drawn from eight, each on one of the last three values."""
    generator = random.Random(0)
    functions = [torch.sin, torch.cos, torch.tanh, torch.exp, torch.neg, torch.relu, torch.sigmoid, torch.abs]
    graph = fx.Graph()
    values = [graph.placeholder("x")]
    for _ in range(ops):
        values.append(graph.call_function(generator.choice(functions), (generator.choice(values[-3:]),)))
    graph.output(values[-1])
    return graph, {}


def main() -> None:
    rows = []
    for name, make in (("residual blocks", blocks), ("random ops", random_ops)):
        for ops in (1_000, 10_000, 30_000, 100_000):
            graph, attributes = make(ops)
            count = sum(node.op.startswith("call_") for node in graph.nodes)
            gc.collect()
            times = [time.perf_counter()]
            found = find_chains(graph, attributes, min_length=8)
            times.append(time.perf_counter())
            sortable_chains(graph, found.chains)
            times.append(time.perf_counter())
            detect, sort = times[1] - times[0], times[2] - times[1]
            rows.append((name, count, len(found.chains), f"{detect:.2f}", f"{sort:.2f}", f"{1e6 * detect / count:.0f}"))
    headers = ("graph", "ops", "chains", "detection, s", "ordering, s", "detection, us per op")
    notes = "Detection is `find_chains`; ordering is what the rewrite adds to it. One run each, after a collection."
    record("detection", "Detection against the size of the graph", headers, rows, notes)


if __name__ == "__main__":
    main()
