"""`torch.compile(model, backend="deeppcr")`, as a user calls it."""

import copy
import logging
import os
import subprocess
import sys

import pytest
import torch
from comparison import assert_same
from models import Diverging, ResidualNet, plain_mlp
from planner_cases import rigged
from torch import Tensor, nn

import pcr_fx
from pcr_fx import backend
from pcr_fx.planner import plan

pytestmark = pytest.mark.usefixtures("fresh_compiler")
EAGER = {"solver": "newton", "kernels": False, "inner_backend": "eager"}


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 64])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_matches_the_model_in_float64(length: int, batch: int) -> None:
    model = ResidualNet(length).double()
    compiled = torch.compile(model, backend="deeppcr", options=EAGER)
    assert_same(compiled, model, torch.randn(batch, 3, dtype=torch.float64), 1e-9)
    assert len(pcr_fx.report().chains) == (length >= 8)


def test_deep_chain_through_inductor() -> None:
    model = ResidualNet(256).double()
    compiled = torch.compile(model, backend="deeppcr", options={"solver": "newton"})
    assert_same(compiled, model, torch.randn(2, 3, dtype=torch.float64), 1e-9)
    (chain,) = pcr_fx.report().to_dict()["chains"]
    assert chain["modules"] == "blocks.0..255"
    assert chain["length"] == 256
    assert chain["solver_forward"] == chain["solver_backward"] == "newton"
    assert 0 < chain["iterations"] < 32
    assert chain["residual"] <= chain["tolerance"]
    assert chain["fallbacks"] == 0


@pytest.mark.parametrize("solver", ["auto", "newton", "sequential"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_solvers_and_inner_backends(solver: str, inner: str) -> None:
    model = plain_mlp(40).double()
    options = {"solver": solver, "inner_backend": inner}
    compiled = torch.compile(model, backend="deeppcr", options=options, fullgraph=True)
    assert_same(compiled, model, torch.randn(5, 4, dtype=torch.float64), 1e-9)


def test_a_callable_inner_backend_gets_the_rest() -> None:
    graphs = []

    def inner(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    model = ResidualNet(12)
    torch.compile(model, backend="deeppcr", options={"solver": "newton", "inner_backend": inner})(torch.randn(2, 3))
    ops = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_module"]
    assert ops == ["pcr_fx_solve_0"]


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_one_graph_for_all_batch_sizes(inner: str) -> None:
    model = ResidualNet(16)
    graphs = []

    def counting(graph_module, example_inputs):
        graphs.append(graph_module)
        return torch._dynamo.lookup_backend(inner)(graph_module, example_inputs)

    options = {"solver": "newton", "inner_backend": counting}
    compiled = torch.compile(model, backend="deeppcr", dynamic=True, fullgraph=True, options=options)
    for batch in (5, 2, 9, 33, 4):
        x = torch.randn(batch, 3)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) == 1


class Scaled(nn.Module):
    """Its two numbers are what a compiler that leaves sizes open leaves open as well."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.norm, self.linear, self.scale = nn.LayerNorm(4), nn.Linear(4, 4), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * torch.tanh(self.linear(self.norm(x)))


@pytest.mark.parametrize("step", [0.0, 0.01])
def test_numbers_of_modules_that_are_left_open(step: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Scaled(0.3 + step * index) for index in range(12))).double()
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module

    compiled = torch.compile(model, backend="deeppcr", dynamic=True, options={**EAGER, "inner_backend": counting})
    for change in (1.0, -0.5):
        for block in model:
            block.scale *= change
        for batch in (5, 2, 7):
            assert_same(compiled, model, torch.randn(batch, 4, dtype=torch.float64), 1e-10)
        assert len(pcr_fx.report().chains) == 1
    assert len(graphs) == 2


def test_numbers_left_open_that_no_tensor_can_stand_for_end_a_chain() -> None:
    """A slope is an argument of its op: blocks with another one are another chain, as they are without `dynamic`."""

    class Leaky(nn.Module):
        def __init__(self, slope: float) -> None:
            super().__init__()
            self.linear, self.slope = nn.Linear(4, 4), slope

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 0.1 * nn.functional.leaky_relu(self.linear(x), self.slope)

    model = nn.Sequential(*(Leaky(0.1 if index < 10 else 0.2) for index in range(20))).double()
    compiled = torch.compile(model, backend="deeppcr", dynamic=True, options=EAGER)
    assert_same(compiled, model, torch.randn(3, 4, dtype=torch.float64), 1e-10)
    assert [entry["length"] for entry in pcr_fx.report().to_dict()["chains"]] == [10, 10]


@pytest.mark.parametrize("kind", [float, int])
def test_a_number_that_depends_on_data_is_a_reason(kind: type) -> None:
    class Read(ResidualNet):
        def forward(self, x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
            x, factor = self.stem(x), number.sum().item()
            for block in self.blocks:
                x = x + factor * block(x)
            return x

    model, inputs = Read(12), (torch.randn(2, 3), torch.tensor(kind(2)))
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(model, backend="deeppcr", fullgraph=True, options=EAGER)
        torch.testing.assert_close(compiled(*inputs), model(*inputs))
    assert "no tensor but a number that depends on data" in " ".join(str(pcr_fx.report()).split())


def test_no_grad_and_inference_mode() -> None:
    model = ResidualNet(16)
    compiled = torch.compile(model, backend="deeppcr", options=EAGER)
    x = torch.randn(3, 3)
    with torch.no_grad():
        output = compiled(x)
    assert not output.requires_grad
    torch.testing.assert_close(output, model(x))
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), model(x))


def test_auto_without_gradients_leaves_alone_what_only_the_backward_would_gain_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward = {"forward_eager": 1.0, "forward_sequential": 1.1, "forward_newton": 3.0}
    monkeypatch.setattr(plan, "measure", rigged(**forward, backward_eager=3.0, backward_newton=1.0)[0])
    model = ResidualNet(64)
    compiled = torch.compile(model, backend="deeppcr", options={"inner_backend": "eager", "kernels": False})
    with torch.no_grad():
        compiled(torch.randn(3, 3))
    assert not pcr_fx.report().to_dict()["chains"][0]["rewritten"]
    compiled(torch.randn(3, 3)).sum().backward()
    (chain,) = pcr_fx.report().to_dict()["chains"]
    assert (chain["rewritten"], chain["solver_forward"], chain["solver_backward"]) == (True, "sequential", "newton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models(dtype: torch.dtype) -> None:
    model = ResidualNet(16)
    reference = copy.deepcopy(model).double()
    low = model.to(dtype)
    x = torch.randn(3, 3).to(dtype)
    output = torch.compile(low, backend="deeppcr", options=EAGER)(x)
    assert output.dtype == dtype
    # Solved in float32, it is nearer to float64 than the model itself, whose weights are rounded either way.
    reference.load_state_dict({name: value.double() for name, value in low.state_dict().items()})
    exact = reference(x.double())
    assert (output.double() - exact).abs().max() <= (low(x).double() - exact).abs().max() + torch.finfo(dtype).eps


def test_autocast_around_and_inside() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ResidualNet(16)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.net(x)
            return y, self.net(x)

    model, x = ResidualNet(16), torch.randn(3, 3)
    compiled = torch.compile(model, backend="deeppcr", options=EAGER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = compiled(x), model(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, atol=3e-2, rtol=3e-2)
    mixed = Mixed()
    got, expected = torch.compile(mixed, backend="deeppcr", options=EAGER)(x), mixed(x)
    assert [value.dtype for value in got] == [value.dtype for value in expected]
    torch.testing.assert_close(got[0], expected[0], atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(got[1], expected[1])


def test_a_diverging_chain_falls_back_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = Diverging(60)
    compiled = torch.compile(model, backend="deeppcr", options=EAGER)
    x = torch.randn(2, 5)
    with caplog.at_level(logging.WARNING, logger="pcr_fx"):
        torch.testing.assert_close(compiled(x), model(x))
    assert "evaluated sequentially instead" in caplog.text
    (chain,) = pcr_fx.report().to_dict()["chains"]
    assert chain["fallbacks"] == 1
    assert chain["fallback_reason"]
    assert "1 in 1 calls" in str(pcr_fx.report())


def test_on_failure_raise() -> None:
    compiled = torch.compile(Diverging(60), backend="deeppcr", options={**EAGER, "on_failure": "raise"})
    with pytest.raises(pcr_fx.SolveError, match="Newton did not solve"):
        compiled(torch.randn(2, 5))


def test_nan_in_the_input_gives_what_the_model_gives() -> None:
    model = ResidualNet(16)
    compiled = torch.compile(model, backend="deeppcr", options=EAGER)
    x = torch.randn(3, 3)
    x[1, 0] = float("nan")
    torch.testing.assert_close(compiled(x), model(x), equal_nan=True)
    assert pcr_fx.report().to_dict()["chains"][0]["fallbacks"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solvr": "newton"}, "unknown option 'solvr'; valid options are solver,"),
        ({"solver": "newtn"}, "solver='newtn' is not allowed; it must be one of 'auto', 'newton', 'quasi-newton',"),
        ({"inner_backend": "nothing"}, "inner_backend='nothing' is not allowed; it must be one of"),
        ({"inner_backend": "deeppcr"}, "other than 'deeppcr' itself"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(Exception, match="OptionError") as caught:
        torch.compile(ResidualNet(8), backend="deeppcr", options=options)(torch.randn(2, 3))
    assert message in str(caught.value)


def test_models_without_tensor_outputs_or_tensors() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ResidualNet(12)

        def forward(self, x):
            y = self.net(x)
            return {"logits": y, "count": len(self.net.blocks), "name": "net", "none": None, "pair": (y, y + 1)}

    model, x = Several(), torch.randn(2, 3)
    got, expected = torch.compile(model, backend="deeppcr", options=EAGER)(x), model(x)
    assert got.keys() == expected.keys()
    assert (got["count"], got["name"], got["none"]) == (12, "net", None)
    torch.testing.assert_close((got["logits"], got["pair"]), (expected["logits"], expected["pair"]))
    assert len(pcr_fx.report().chains) == 1


def test_no_chain_is_said_loudly_and_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    compiled = torch.compile(model, backend="deeppcr", options={"inner_backend": "eager"})
    with caplog.at_level(logging.WARNING, logger="pcr_fx"):
        compiled(torch.randn(2, 3))
        compiled(torch.randn(2, 3))
    assert caplog.text.count("no chain found") == 1
    assert "NO CHAIN FOUND" in str(pcr_fx.report())


def test_dropout_in_training_is_drawn_apart() -> None:
    model, x = ResidualNet(16, dropout=0.5), torch.randn(2, 3)
    compiled = torch.compile(model, backend="deeppcr", options=EAGER)
    torch.manual_seed(0)
    got = compiled(x)
    torch.manual_seed(0)
    torch.testing.assert_close(got, model(x))
    assert [chain["length"] for chain in pcr_fx.report().to_dict()["chains"]] == [16]
    compiled.eval()(x)
    assert len(pcr_fx.report().chains) == 1


def test_a_broken_graph_is_one_report() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = plain_mlp(10), plain_mlp(12)

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model, x = Broken(), torch.randn(2, 4)
    torch.testing.assert_close(torch.compile(model, backend="deeppcr", options=EAGER)(x), model(x))
    report = pcr_fx.report()
    assert [chain["length"] for chain in report.to_dict()["chains"]] == [10, 12]
    assert "broke the model into 2 graphs" in str(report)


def test_copies_and_state_dicts() -> None:
    model = ResidualNet(16)
    compiled = torch.compile(model, backend="deeppcr", options=EAGER)
    x = torch.randn(3, 3)
    compiled(x)
    copied = copy.deepcopy(compiled)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(copied(x), compiled(x))
    compiled.load_state_dict(copied.state_dict())
    torch.testing.assert_close(copied(x), compiled(x))


def test_training_follows_the_model() -> None:
    models = [ResidualNet(32).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    runs = [models[0], torch.compile(models[1], backend="deeppcr", options={"solver": "newton"})]
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(2, (8,))
    losses: list[list[float]] = [[], []]
    for model, run, kept in zip(models, runs, losses, strict=True):
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(5):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(run(x), y)
            loss.backward()
            optimiser.step()
            kept.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)
    assert losses[0][-1] < losses[0][0]


def test_a_fallback_graph_outlives_its_model() -> None:
    model = ResidualNet(16)
    x = torch.randn(3, 3, requires_grad=True)
    loss = torch.compile(model, backend="deeppcr", options={"solver": "newton"})(x).sum()
    del model
    torch._dynamo.reset()
    loss.backward()
    assert x.grad is not None


def test_logs_through_torch_logs() -> None:
    script = (
        "import torch; from torch import nn\n"
        "m = nn.Sequential(*(l for _ in range(20) for l in (nn.Linear(4, 4), nn.Tanh())))\n"
        "torch.compile(m, backend='deeppcr', options={'solver': 'newton', 'inner_backend': 'eager'})(torch.randn(2, 4))\n"
    )
    environment = {**os.environ, "TORCH_LOGS": "+pcr_fx", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = "import pcr_fx\n" + script
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "forward by newton" in done.stderr


@torch._dynamo.config.patch(recompile_limit=100)
def test_what_is_compiled_anew_is_not_remembered_twice() -> None:
    """Only the rest behind a graph break depends on the mode, so that it alone is compiled for each."""
    net, modes = plain_mlp(12), [f"mode {index}" for index in range(20)]

    def forward(x: Tensor, mode: str) -> Tensor:
        y = net(x)
        torch._dynamo.graph_break()
        return net(y) + modes.index(mode)

    compiled = torch.compile(forward, backend="deeppcr", options=EAGER)
    for index, mode in enumerate(modes):
        x = torch.randn(2, 4)
        torch.testing.assert_close(compiled(x, mode), net(net(x)) + index)
    assert len(backend._latest.reports) == 2
    assert len(pcr_fx.report().chains) == 2
    assert "torch.compile broke the model into 2 graphs" in str(pcr_fx.report())
