"""The passes in their order, as a way in sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import ResidualNet
from torch import Tensor, fx, nn

from pcr_fx import Options
from pcr_fx.node import SolveNode
from pcr_fx.passes.capture import capture_model
from pcr_fx.passes.pipeline import run_passes
from pcr_fx.passes.plan import PlannedChain

OPTIONS = Options(solver="sequential", kernels=False)


class Traced:
    """A way in that gives every chain a solve node, or none."""

    guards_sizes = False

    def __init__(self, root: nn.Module, x: Tensor, places: bool = True) -> None:
        self.root, self.x, self.places = root, x, places
        self.values: dict[fx.Node, Any] = {}

    def capture(self) -> fx.Graph:
        return capture_model(self.root, self.x).graph

    def place(self, graph: fx.Graph, planned: Sequence[PlannedChain]) -> list[PlannedChain]:
        if not self.places:
            return list(planned)
        return [
            replace(item, node=SolveNode(item.found.chain, OPTIONS, item.plan, item.found.leaving)) for item in planned
        ]

    def calls_modules(self, graph: fx.Graph) -> bool:
        return True

    def stack(self, new: fx.Graph, operand: Sequence[fx.Node], copies: dict[fx.Node, fx.Node]) -> fx.Node:
        return new.call_function(torch.stack, ([copies[node] for node in operand],))


class TwoNets(nn.Module):
    """Two chains, and blocks between them that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.second = ResidualNet(12), ResidualNet(9, dropout=0.5), ResidualNet(10)
        for block in list(self.between.modules()):
            for name, child in block.named_children():
                if isinstance(child, nn.Dropout):
                    setattr(block, name, nn.AlphaDropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.cat([self.between(torch.cat([self.first(x), x[:, :1]], 1)), x[:, :1]], 1))


def called(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


def test_one_record_says_all() -> None:
    rewritten = run_passes(Traced(TwoNets(), torch.randn(2, 3)), OPTIONS)
    assert [item.found.chain.length for item in rewritten.planned] == [12, 10]
    assert called(rewritten.graph) == list(rewritten.nodes) == ["pcr_fx_solve_0", "pcr_fx_solve_1"]
    assert list(rewritten.nodes.values()) == [item.node for item in rewritten.planned]
    assert [entry.node for entry in rewritten.report.chains] == [item.node for item in rewritten.planned]
    assert rewritten.report.rejected == rewritten.near_misses
    assert any("random op alpha_dropout" in miss.reason for miss in rewritten.near_misses)


def test_a_chain_without_a_node_keeps_the_models_ops() -> None:
    model, x = ResidualNet(12), torch.randn(2, 3)
    rewritten = run_passes(Traced(model, x, places=False), OPTIONS)
    assert not rewritten.nodes and not called(rewritten.graph)
    (entry,) = rewritten.report.chains
    assert entry.node is None and entry.is_left_alone
    torch.testing.assert_close(fx.GraphModule(model, rewritten.graph)(x), model(x))


@pytest.mark.parametrize("length", [3, 12])
def test_the_rewritten_graph_computes_the_same(length: int) -> None:
    model, x = ResidualNet(length).double(), torch.randn(2, 3, dtype=torch.float64)
    rewritten = run_passes(Traced(model, x), OPTIONS)
    attributes = dict(model.named_parameters())
    run = fx.GraphModule({**attributes, **rewritten.nodes}, rewritten.graph)
    torch.testing.assert_close(run(x), model(x))
    assert bool(rewritten.nodes) == (length == 12)
