"""One transformed model called with one shape after another: what is made for the first has to be right for all, or made anew."""

from typing import Any

import pytest
import torch
from comparison import relative_error
from shapes import SEQUENCES, D, Net, assert_agree
from torch import Tensor, nn

import pcr_fx
from pcr_fx.body import program
from pcr_fx.planner import plan
from pcr_fx.registry import Registry

pytestmark = pytest.mark.usefixtures("kernel_cache")
OPTIONS: list[dict[str, Any]] = [
    {"planning": "estimated"},
    {"solver": "sequential"},
    {"solver": "newton"},
    {"solver": "newton", "kernels": False},
    {"solver": "sequential", "kernels": False},
]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal content of other tests would hide what is made for the first of several shapes."""
    monkeypatch.setattr(program, "_of_block", Registry())
    monkeypatch.setattr(plan, "_plans", Registry())


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("normalised", [False, True])
def test_shapes_one_after_another(name: str, options: dict[str, Any], normalised: bool) -> None:
    sequence = [(batch, shape) for batch, shape in SEQUENCES[name] if not normalised or shape[-1] == D]
    model = Net(8, normalised).double()
    assert_agree(lambda x, c: pcr_fx.transform(model, (x, c), options), model, sequence)


@pytest.mark.parametrize("options", OPTIONS[:3], ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize(
    "name", ["positions", "positions of one length", "one position at first", "one for all positions"]
)
def test_shapes_that_a_compiler_leaves_open(name: str, options: dict[str, Any]) -> None:
    """A compiled graph names its plan: it is compiled anew for sizes that the plan is not for."""
    torch._dynamo.reset()
    model = Net(8).double()
    compiled = torch.compile(model, backend="deeppcr", dynamic=True, options={**options, "inner_backend": "aot_eager"})
    assert_agree(lambda x, c: compiled, model, SEQUENCES[name])


def test_plans_are_shared_where_one_is_right_for_all_sizes() -> None:
    """Kernels are not printed anew for each batch size, but for each number of positions that they are bound to."""
    for shapes, plans in ((SEQUENCES["positions of one length"], 1), (SEQUENCES["positions"], 5)):
        fast = pcr_fx.transform(Net(8), None, {"solver": "sequential"})
        for batch, shape in shapes:
            fast(torch.randn(*batch, D), torch.randn(*shape))
        (node,) = (node for node in fast._pcr_variants[0].run.children() if hasattr(node, "routes"))
        assert len({route.plan.key for route in node.routes.known.values()}) == plans


def test_what_is_too_large_for_a_kernel_is_so_for_its_size_only() -> None:
    fast = pcr_fx.transform(Net(8), None, {"solver": "sequential"})
    for positions, name in ((20000, "too many for the stack"), (7, "native kernel")):
        with torch.no_grad():
            fast(torch.randn(2, positions, D), torch.randn(positions, D))
        assert name in " ".join(str(fast.report).split())


@pytest.mark.parametrize("options", OPTIONS[1:], ids=lambda options: "-".join(map(str, options.values())))
def test_a_state_without_dimensions(options: dict[str, Any]) -> None:
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factors = nn.ParameterList([torch.tensor(0.1 * index) for index in range(9)])

        def forward(self, x: Tensor) -> Tensor:
            for factor in self.factors:
                x = 0.9 * x + 0.1 * torch.tanh(x * factor)
            return x

    model, x = Scalar().double(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    fast = pcr_fx.transform(model, (x,), options)
    assert len(fast.report.chains) == 1
    for got, expected in zip(*(torch.autograd.grad(m(x), [x, *m.parameters()]) for m in (fast, model)), strict=True):
        assert relative_error(got, expected) < 1e-12


def test_models_of_equal_content_have_reports_and_measurements_of_their_own_shapes() -> None:
    for batch in (5, 3):
        model, x = Net(9), torch.randn(batch, D)
        fast = pcr_fx.transform(model, (x, x), {"kernels": False, "planning": "estimated"})
        assert fast.report.to_dict()["chains"][0]["state_shape"] == [batch, D]
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="deeppcr", options={"kernels": False, "inner_backend": "eager"})
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, 2 * x), model(x, 2 * x))
