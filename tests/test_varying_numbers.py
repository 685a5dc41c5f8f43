"""Numbers that change from block to block, wherever they stand: their ops are written out, and compute what they computed."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from comparison import chains_of, rewritten, value_and_gradients
from fuzz.interpreted import interpreted
from torch import Tensor, fx, nn

import pcr_fx
from pcr_fx.passes.varying_numbers import write_numbers_out

LENGTH = 8

BLOCKS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "add": lambda x, p, i: torch.tanh(torch.add(x, p, alpha=0.1 * i)),
    "sub": lambda x, p, i: torch.tanh(x.sub(p, alpha=i)),
    "addcmul": lambda x, p, i: torch.tanh(torch.addcmul(x, p, x, value=0.1 * i)),
    "addcdiv": lambda x, p, i: torch.tanh(x.addcdiv(p, x.abs() + 1, value=0.1 * i)),
    "lerp": lambda x, p, i: torch.lerp(x, p, 0.05 * i),
    "lerp, from both ends": lambda x, p, i: torch.lerp(x, p, 0.12 * i),
    "full_like": lambda x, p, i: torch.tanh(x * p + torch.full_like(x, 0.1 * i)),
    "new_full": lambda x, p, i: torch.tanh(x * p + x.new_full((4,), 0.1 * i)),
    "clamp": lambda x, p, i: (x + p).clamp(-0.1 * i, 0.1 * i),
    "clamp_max": lambda x, p, i: (x + p).clamp(max=0.1 * i),
    "clamp_min": lambda x, p, i: torch.clamp_min(x - p, -0.1 * i),
    "hardtanh": lambda x, p, i: F.hardtanh(x + p, -0.1 * i - 0.1, 0.1 * i + 0.3),
    "threshold": lambda x, p, i: F.threshold(x + p, 0.1 * i, -0.1),
    "leaky_relu": lambda x, p, i: F.leaky_relu(x - p, 0.1 * i),
    "elu": lambda x, p, i: F.elu(x - p, 0.1 * i + 0.1),
    "softplus": lambda x, p, i: F.softplus(x - p, 0.1 * i + 1),
    "where": lambda x, p, i: torch.where(x > 0.1 * i, x * p, 0.2 * i),
    "masked_fill": lambda x, p, i: (x * p).masked_fill(x > 0.3, i),
    "remainder": lambda x, p, i: (x + p) % (0.5 + 0.1 * i),
    "two of them": lambda x, p, i: torch.lerp(x.clamp(max=1 + 0.1 * i), p, 0.05 * i),
}
# Each twice, where derivatives have two branches, and where something is lost in infinities.
SPECIAL = [-torch.inf, -1e4, -1.0, -0.5, -0.0, 0.0, 0.25, 0.5, 1.0, 30.0, 1e4, torch.inf, torch.nan]


class Model(nn.Module):
    def __init__(self, block: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.block = block
        draw = torch.Generator().manual_seed(0)
        self.p = nn.ParameterList(0.4 + 0.5 * torch.rand(4, generator=draw, dtype=torch.float64) for _ in range(LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        for index, p in enumerate(self.p):
            x = self.block(x, p, index)
        return x


@pytest.mark.parametrize(
    ("name", "way"),
    [*((name, "transform") for name in BLOCKS), *((name, "compile") for name in ("clamp", "leaky_relu", "where"))],
)
def test_the_chain_is_found_and_has_a_kernel(name: str, way: str) -> None:
    model, x = Model(BLOCKS[name]), torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options = {"planning": "estimated", "solver": "sequential"}
    parameters = list(model.parameters())
    with interpreted():
        fast = rewritten(model, x, way, options)
        pairs = zip(*(value_and_gradients(run, parameters, x) for run in (fast, model)), strict=True)
        for got, expected in pairs:
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    (chain,) = chains_of(fast)
    assert chain["length"] == LENGTH
    assert chain["native_forward"] and chain["native_backward"], chain["reason"]


@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in ("where", "masked_fill", "remainder")])
def test_what_is_written_out_computes_the_same_at_special_values(name: str) -> None:
    """Also where an infinity or NaN goes, and which derivative a bound has."""
    numbers = torch.tensor(SPECIAL, dtype=torch.float64)
    graph = fx.symbolic_trace(lambda x, p: BLOCKS[name](x, p, 5))
    for node, value in zip(graph.graph.nodes, _values(graph, numbers[:4], numbers[:4]), strict=True):
        node.meta["example_value"] = value
    found = [node for node in graph.graph.nodes if node.op.startswith("call_")]
    before = len(found)
    p = (
        torch.zeros(4, dtype=torch.float64)
        if not name.startswith("lerp")
        else torch.full((4,), 0.5, dtype=torch.float64)
    )
    columns = [numbers[index : index + 1].expand(4) for index in range(len(numbers))]
    expected = [_with_derivative(graph, x, p) for x in columns]
    assert write_numbers_out(found)
    graph.recompile()
    assert len(graph.graph.nodes) - 3 > before
    for x, (y, slope) in zip(columns, expected, strict=True):
        got, derivative = _with_derivative(graph, x, p)
        torch.testing.assert_close(got, y, rtol=1e-12, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(derivative, slope, rtol=1e-12, atol=1e-12, equal_nan=True)


def _values(graph: fx.GraphModule, *given: Tensor) -> list[object]:
    interpreter = fx.Interpreter(graph, garbage_collect_values=False)
    interpreter.run(*given)
    return [interpreter.env[node] for node in graph.graph.nodes if node in interpreter.env] + [None] * (
        len(graph.graph.nodes) - len(interpreter.env)
    )


def _with_derivative(graph: fx.GraphModule, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = graph(x, p)
    return y, torch.autograd.grad(y.sum(), x, allow_unused=True, materialize_grads=True)[0]


def test_numbers_that_do_not_change_stay_where_they_are() -> None:
    model = Model(lambda x, p, i: F.leaky_relu(x - p, 0.1) + torch.lerp(x, p, 0.05 * i))
    fast = pcr_fx.transform(model, torch.randn(3, 4, dtype=torch.float64), options={"kernels": False})
    (chain,) = fast.report.chains
    assert "leaky_relu" in chain.chain.origin.ops and "lerp" not in chain.chain.origin.ops
