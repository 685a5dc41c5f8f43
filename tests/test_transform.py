"""`pcr_fx.transform`, `report` and `explain`, as a user calls them."""

import copy
import gc
import inspect
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comparison import assert_same
from models import Diverging, ResidualNet, plain_mlp
from torch import Tensor, nn

import pcr_fx
from pcr_fx import explicit

# In PyTorch's ops; test_kernels.py and test_native_newton.py have native code.
NEWTON = {"solver": "newton", "kernels": False}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 100])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("with_inputs", [False, True])
def test_matches_the_model_in_float64(length: int, batch: int, with_inputs: bool) -> None:
    model = ResidualNet(length).double()
    x = torch.randn(batch, 3, dtype=torch.float64)
    fast = pcr_fx.transform(model, x if with_inputs else None, NEWTON)
    assert_same(fast, model, x, 1e-9)
    assert len(fast.report.chains) == (length >= 8)


@pytest.mark.parametrize("solver", ["auto", "newton", "sequential"])
def test_depth_1024(solver: str) -> None:
    model = ResidualNet(1024).double()
    fast = pcr_fx.transform(model, options={"solver": solver})
    assert_same(fast, model, torch.randn(2, 3, dtype=torch.float64), 1e-9)


def test_float32_is_as_accurate_as_eager() -> None:
    """Over several models: of one, which rounds the worse is chance."""
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(6):
        torch.manual_seed(seed)
        model, x = ResidualNet(512), torch.randn(4, 3)
        exact = copy.deepcopy(model).double()(x.double())
        fast = pcr_fx.transform(model, options=NEWTON)
        with torch.no_grad():
            errors += torch.stack([(run(x) - exact).abs().max() for run in (fast, model)])
    assert errors[0] <= 2 * errors[1]


def test_the_model_is_left_untouched_and_its_state_is_shared() -> None:
    model = ResidualNet(16)
    before = {module: dict(module.__dict__) for module in model.modules()}
    fast = pcr_fx.transform(model, torch.randn(2, 3), NEWTON)
    fast(torch.randn(2, 3))
    assert all(dict(module.__dict__) == attributes for module, attributes in before.items())
    assert list(fast.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    assert [name for name, _ in fast.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_unused_parameters_and_buffers_are_kept() -> None:
    model = ResidualNet(10)
    model.unused = nn.Linear(2, 2)
    model.register_buffer("mean", torch.ones(3))
    model.register_buffer("scratch", torch.ones(3), persistent=False)
    fast = pcr_fx.transform(model)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert "scratch" in dict(fast.named_buffers())


def test_state_dict_round_trip_and_assign() -> None:
    model, other = ResidualNet(16), ResidualNet(16)
    fast, x = pcr_fx.transform(model, options=NEWTON), torch.randn(3, 3)
    fast.load_state_dict(other.state_dict())
    torch.testing.assert_close(fast(x), other(x))
    third = ResidualNet(16)
    fast.load_state_dict(third.state_dict(), assign=True)
    torch.testing.assert_close(fast(x), third(x))


def test_deepcopy_is_independent() -> None:
    model, x = ResidualNet(16), torch.randn(3, 3)
    fast = pcr_fx.transform(model, options=NEWTON)
    before = fast(x)
    copied = copy.deepcopy(fast)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(fast(x), before)
    assert not torch.allclose(copied(x), before)
    assert copied.report.chains[0].node is not fast.report.chains[0].node


def test_dtype_and_optimiser_changes_are_seen() -> None:
    model, x = ResidualNet(16), torch.randn(3, 3)
    fast = pcr_fx.transform(model, options=NEWTON)
    fast(x)
    optimiser = torch.optim.SGD(fast.parameters(), lr=0.5)
    fast(x).square().sum().backward()
    optimiser.step()
    torch.testing.assert_close(fast(x), model(x))
    fast.double()
    assert fast(x.double()).dtype == torch.float64
    torch.testing.assert_close(fast(x.double()), model.double()(x.double()))


def test_train_and_eval_are_followed() -> None:
    model, x = ResidualNet(16, dropout=0.5), torch.randn(3, 3)
    fast = pcr_fx.transform(model, options=NEWTON)
    assert not fast.report.chains
    torch.manual_seed(7)
    dropped = fast(x)
    torch.manual_seed(7)
    torch.testing.assert_close(dropped, model(x))
    fast.eval()
    assert len(fast.report.chains) == 1
    torch.testing.assert_close(fast(x), copy.deepcopy(model).eval()(x))
    assert model.training
    fast.blocks[3].train()
    assert [chain.chain.length for chain in fast.report.chains] == [12]


class Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return (x > torch.rand_like(x)).to(x.dtype)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.mul_(2)


class Measured(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * x.sum().item()


@pytest.mark.parametrize(
    ("function", "reason"),
    [(Noisy, "draws random numbers"), (Doubled, "writes to its inputs"), (Measured, "local_scalar")],
    ids=["noisy", "doubled", "measured"],
)
def test_functions_with_derivatives_of_their_own_that_do_more_are_refused_by_name(
    function: type[torch.autograd.Function], reason: str
) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(8):
                x = x + function.apply(x)
            return x

    apply = torch.autograd.Function.__dict__["apply"]
    with pytest.raises(pcr_fx.CaptureError, match=rf"{function.__name__} at .* has derivatives of its own.*({reason})"):
        pcr_fx.transform(Net(), torch.ones(2, 3))
    assert torch.autograd.Function.__dict__["apply"] is apply


def test_what_cannot_be_a_chain_runs_as_it_was() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.AlphaDropout(0.5)) for _ in range(10))).double()
    twin, x = copy.deepcopy(model), torch.randn(6, 4, dtype=torch.float64)
    fast = pcr_fx.transform(model, x, NEWTON)
    assert not fast.report.chains
    assert "random op alpha_dropout" in str(fast.report)
    torch.manual_seed(3)
    got = fast(x)
    torch.manual_seed(3)
    torch.testing.assert_close(got, twin(x))
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


def test_diverging_chain() -> None:
    model = Diverging(60).double()
    fast = pcr_fx.transform(model, options=NEWTON)
    x = torch.randn(2, 5, dtype=torch.float64)
    torch.testing.assert_close(fast(x), model(x))
    (chain,) = fast.report.to_dict()["chains"]
    assert chain["fallbacks"] == 1
    assert chain["sequential_depth_after"] == 60
    raising = pcr_fx.transform(model, options={**NEWTON, "on_failure": "raise"})
    with pytest.raises(pcr_fx.SolveError):
        raising(x)
    (chain,) = raising.report.to_dict()["chains"]
    assert chain["calls"] == 1 and chain["iterations"] > 0
    assert chain["outcome"] not in (None, str(pcr_fx.Outcome.CONVERGED))


def test_hooks_run() -> None:
    model, x, calls = plain_mlp(12), torch.randn(2, 4), []
    fast = pcr_fx.transform(model, options=NEWTON)
    fast.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    fast(x)
    assert calls == [x.shape]


def test_compiling_a_transformed_module_is_harmless() -> None:
    model, x = ResidualNet(16), torch.randn(3, 3)
    compiled = torch.compile(pcr_fx.transform(model, options=NEWTON), backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("bad", [print, "model", torch.relu])
def test_only_modules_are_transformed(bad) -> None:
    with pytest.raises(pcr_fx.UnsupportedError, match=r"takes a torch\.nn\.Module, got"):
        pcr_fx.transform(bad)


def test_models_that_branch_on_values_are_refused_with_advice() -> None:
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(pcr_fx.CaptureError, match=r'test_transform.py.*backend="deeppcr"'):
        pcr_fx.transform(Branching(), torch.randn(2))
    with pytest.raises(pcr_fx.CaptureError, match="pass example_inputs"):
        pcr_fx.transform(nn.BatchNorm1d(4))


def test_what_a_trace_without_inputs_lacks_is_named() -> None:
    class Steps(nn.Module):
        def forward(self, x, h):
            for step in x.unbind(1):
                h = torch.tanh(h + step)
            return h

    with pytest.raises(pcr_fx.CaptureError, match=r"test_transform.py.*the shape comes from x$"):
        pcr_fx.transform(Steps())


def test_bad_arguments() -> None:
    with pytest.raises(pcr_fx.UnsupportedError, match="a module or a function, got int"):
        pcr_fx.explain(5)  # type: ignore[arg-type]
    with pytest.raises(pcr_fx.UnsupportedError, match="pack_parameters must be True or False, got 'yes'"):
        pcr_fx.transform(plain_mlp(12), pack_parameters="yes")  # type: ignore[arg-type]


def test_report_and_explain() -> None:
    model, x = ResidualNet(16), torch.randn(3, 3)
    fast = pcr_fx.transform(model, options=NEWTON)
    assert pcr_fx.report(fast) is fast.report
    with pytest.raises(pcr_fx.UnsupportedError, match="got ResidualNet"):
        pcr_fx.report(model)
    explained = pcr_fx.explain(model, x, options=NEWTON)
    (chain,) = explained.to_dict()["chains"]
    assert (chain["modules"], chain["length"], chain["state_shape"]) == ("blocks.0..15", 16, [3, 4])
    assert (chain["dimension"], chain["batch_dims"], chain["calls"]) == (4, [0], 0)
    assert "blocks.0..15" in str(explained)


def test_the_report_has_the_documented_keys() -> None:
    model, x = ResidualNet(16, dropout=0.0), torch.randn(3, 3)
    fast = pcr_fx.transform(model, x, NEWTON)
    fast(x).sum().backward()
    report = fast.report.to_dict()
    needed = "modules length state_shape solver_forward solver_backward iterations residual fallbacks"
    assert set(needed.split()) <= set(report["chains"][0])
    assert report["chains"][0]["residual"] <= report["chains"][0]["tolerance"]
    assert report["chains"][0]["source"].startswith("models.py:")
    fast.train()
    dropped = pcr_fx.transform(ResidualNet(16, dropout=0.5)).report.to_dict()
    assert {"modules", "reason"} <= set(dropped["rejected"][0])


@pytest.mark.parametrize("solver", ["auto", "newton", "sequential"])
def test_pickle_before_and_after_calls(solver: str, tmp_path: Path) -> None:
    model, x = plain_mlp(12), torch.randn(2, 4)
    fast = pcr_fx.transform(model, options={"solver": solver})
    for _ in range(3):
        copied = pickle.loads(pickle.dumps(fast))
        torch.testing.assert_close(copied(x), model(x))
        copied(x).sum().backward()
        fast(x).sum().backward()
    (tmp_path / "fast").write_bytes(pickle.dumps((fast, x, model(x))))
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        f"import pickle, torch\nfast, x, y = pickle.load(open({str(tmp_path / 'fast')!r}, 'rb'))\n"
        "torch.testing.assert_close(fast(x), y); fast(x).sum().backward(); fast.report"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("solver", ["auto", "newton", "sequential"])
def test_low_precision_keeps_its_dtype(solver: str) -> None:
    model, x = ResidualNet(16).bfloat16(), torch.randn(3, 3, dtype=torch.bfloat16)
    fast = pcr_fx.transform(model, options={"solver": solver})
    assert fast(x).dtype == torch.bfloat16
    torch.testing.assert_close(fast(x), model(x), atol=3e-2, rtol=3e-2)
    mixed = ResidualNet(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = pcr_fx.transform(mixed, options={"solver": solver})(x.float()), mixed(x.float())
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, atol=3e-2, rtol=3e-2)


class Products(nn.Module):
    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.multiply = multiply
        self.weights = nn.ParameterList([torch.randn(4, 4) / 3 for _ in range(12)])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(x) + self.multiply(x, weight)
        return x


@pytest.mark.parametrize("solver", ["auto", "sequential", "newton"])
def test_float32_weights_and_a_bfloat16_input_do_what_they_do_in_eager(solver: str) -> None:
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    promoting, refusing = Products(lambda x, weight: 0.5 * x * weight[0]), Products(torch.matmul)
    got, expected = pcr_fx.transform(promoting, x, options={"solver": solver})(x), promoting(x)
    assert got.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    for model in (refusing, pcr_fx.transform(refusing, x, options={"solver": solver})):
        with pytest.raises(RuntimeError, match="same dtype"):
            model(x)


def test_a_tensor_has_only_a_tensors_attributes_while_traced() -> None:
    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for weight in range(1, 10):
                x = torch.tanh(weight * x) if not hasattr(x, "jax") else x.jax()  # as libraries tell arrays apart
            return x

    x = torch.randn(3, 4)
    fast = pcr_fx.transform(Asking(), x)
    assert fast.report.chains[0].chain.length == 9
    torch.testing.assert_close(fast(x), Asking()(x))


def test_a_packed_sequential_is_read_again() -> None:
    """A Sequential calls every module that it holds, and must not find the packed parameters among them."""
    model, x = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(9))), torch.randn(2, 3)
    packed = pcr_fx.transform(model, x, pack_parameters=True)
    copied = copy.deepcopy(packed)
    with torch.no_grad():
        next(packed.parameters()).zero_()
    torch.testing.assert_close(copied(x), model(x))
    assert copied.state_dict().keys() == model.state_dict().keys()


def test_a_packed_module_can_be_printed() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(9)))
    fast = pcr_fx.transform(model, torch.randn(2, 3), pack_parameters=True)
    assert "Linear(in_features=3, out_features=3, bias=True)" in repr(fast)
    assert torch.equal(fast(torch.ones(2, 3)), fast(torch.ones(2, 3)))


def test_any_number_of_tensors_with_other_shapes_later() -> None:
    class Several(ResidualNet):
        def forward(self, *tensors: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
            x = self.stem(tensors[0] * tensors[1].shape[0])
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    model, inputs = Several(12), lambda batch: (torch.randn(batch, 3), torch.randn(batch))
    fast = pcr_fx.transform(model, inputs(3), NEWTON)
    for batch in (3, 5):
        tensors = inputs(batch)
        torch.testing.assert_close(fast(*tensors), model(*tensors))
    assert len(fast.report.chains) == 1


def test_an_op_without_a_result_is_a_reason() -> None:
    class Solving(ResidualNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = x + 0.1 * torch.linalg.solve(3 * torch.eye(4) + block.inner.weight.new_ones(4, 4), x.T).T
            return self.head(x)

    model, x = Solving(12), torch.randn(5, 3)
    fast = pcr_fx.transform(model, (x,))
    torch.testing.assert_close(fast(x), model(x))
    # PyTorch 2.11 solves without an op that checks for errors, which is what returns nothing.
    assert "returns nothing" in str(fast.report) or fast.report.chains


class Scaled(nn.Module):
    """Traced anew for each number that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 3)

    def forward(self, x: Tensor, factor: float) -> Tensor:
        return self.net(x) * factor


def test_graphs_of_many_different_calls_are_not_kept_for_ever() -> None:
    model, x = Scaled(), torch.randn(2, 3)
    fast = pcr_fx.transform(model, (x, 0.0))
    graphs = []
    for factor in map(float, range(500)):
        torch.testing.assert_close(fast(x, factor), model(x, factor))
        graphs.append(weakref.ref(fast._pcr_variants[0].run))
    gc.collect()
    alive = [index for index, graph in enumerate(graphs) if graph() is not None]
    assert alive == list(range(500 - explicit._GRAPHS_KEPT, 500))


def test_the_graphs_kept_are_those_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explicit, "_GRAPHS_KEPT", 2)
    model, x = Scaled(), torch.randn(2, 3)
    fast = pcr_fx.transform(model, (x, 1.0))
    first = fast._pcr_variants[0]
    for factor in (2.0, 1.0, 3.0):
        torch.testing.assert_close(fast(x, factor), model(x, factor))
    assert len(fast._pcr_variants) == 2
    assert fast._pcr_variants[1] is first


class Documented(ResidualNet):
    """A documented model."""

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        """Scales."""
        return super().forward(x) * scale


def test_it_is_called_and_documented_as_its_model() -> None:
    fast = pcr_fx.transform(Documented(9), torch.randn(2, 3), NEWTON)
    for each in (fast, copy.deepcopy(fast)):
        assert inspect.signature(each.forward) == inspect.signature(Documented(9).forward)
        assert (each.forward.__doc__, type(each).__doc__) == ("Scales.", "A documented model.")
        assert type(each).__module__ == __name__ and type(each).__name__ == "TransformedDocumented"
        assert type(each) is type(fast) and isinstance(each, explicit.TransformedModule)


@pytest.mark.parametrize(
    "op",
    [
        lambda x, number: torch.where(x > 0, x, 0.0),
        lambda x, number: torch.where(x > 0, 0.0, x),
        lambda x, number: x * torch.full_like(x, number),
        lambda x, number: torch.clamp(x, number, 1.0),
        lambda x, number: torch.addcmul(x, x, x, value=number),
        lambda x, number: torch.add(x, x, alpha=number),
    ],
    ids=["where a number", "where not a number", "full_like", "clamp", "addcmul", "alpha"],
)
@pytest.mark.parametrize("is_known", [True, False], ids=["with inputs", "without"])
def test_where_a_number_is_looked_for_a_stand_in_is_no_tensor(op: Callable[..., Tensor], is_known: bool) -> None:
    """PyTorch would read the memory of a tensor that is none."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.number = nn.Parameter(torch.tensor(0.5), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(x, Tensor) and torch.is_tensor(x)
            for _ in range(8):
                x = op(x, self.number)
            return x

    x = torch.randn(2, 3)
    try:
        fast = pcr_fx.transform(Net(), *([x] if is_known else []))
    except pcr_fx.CaptureError:
        return
    torch.testing.assert_close(fast(x), Net()(x))
