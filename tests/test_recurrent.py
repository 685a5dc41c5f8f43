"""PyTorch's recurrent networks as modules: their steps are chains, and what is no faster so stays PyTorch's op."""

import copy
import pickle
from typing import Any

import pytest
import torch
from planner_cases import rigged
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pcr_fx
from pcr_fx import recurrent
from pcr_fx.errors import CaptureError
from pcr_fx.planner import plan

# Block by block in PyTorch's ops: nothing is compiled.
IN_OPS = {"solver": "sequential", "kernels": False}
FORMS = {
    "tanh": lambda: nn.RNN(3, 4),
    "relu, without biases": lambda: nn.RNN(3, 4, nonlinearity="relu", bias=False, batch_first=True),
    "gru": lambda: nn.GRU(3, 4, batch_first=True),
    "gru, layers in both directions": lambda: nn.GRU(3, 4, num_layers=2, bidirectional=True),
    "gru with dropout": lambda: nn.GRU(3, 4, num_layers=3, dropout=0.4, batch_first=True),
    "lstm": lambda: nn.LSTM(3, 4),
    "lstm, layers in both directions": lambda: nn.LSTM(
        3, 4, num_layers=2, bidirectional=True, batch_first=True, dropout=0.3
    ),
    "lstm with projections": lambda: nn.LSTM(3, 4, num_layers=2, proj_size=2, bidirectional=True, bias=False),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def tensors_in(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [one for item in value for one in tensors_in(item)]


def lengths(report: pcr_fx.RewriteReport) -> list[int]:
    return [chain["length"] for chain in report.to_dict()["chains"]]


def all_of(run: Any, inputs: tuple[Any, ...], parameters: list[Tensor]) -> list[Tensor]:
    """Results and gradients; dropout is the same each time."""
    torch.manual_seed(1)
    results = tensors_in(run(*inputs))
    loss = sum((one * torch.linspace(-1, 1, one.numel(), dtype=one.dtype).view(one.shape)).sum() for one in results)
    wanted = [one for one in [*tensors_in(inputs), *parameters] if one.requires_grad]
    return [*results, *torch.autograd.grad(loss, wanted)]  # type: ignore[arg-type]


def initial_states(module: Any, batch: tuple[int, ...]) -> Any:
    count = module.num_layers * (2 if module.bidirectional else 1)
    sizes = (module.proj_size or 4, 4) if isinstance(module, nn.LSTM) else (4,)
    given = tuple(torch.randn(count, *batch, size, dtype=torch.float64, requires_grad=True) for size in sizes)
    return given if len(given) > 1 else given[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("with_states", [True, False])
def test_every_form_computes_what_the_module_does(form: str, batched: bool, with_states: bool) -> None:
    module = FORMS[form]().double()
    shape = ((3, 11) if module.batch_first else (11, 3)) if batched else (11,)
    x = torch.randn(*shape, 3, dtype=torch.float64, requires_grad=True)
    inputs = (x, initial_states(module, (3,) if batched else ())) if with_states else (x,)
    fast = pcr_fx.transform(module, example_inputs=inputs, options=IN_OPS)
    parameters = list(module.parameters())
    expected, got = all_of(module, inputs, parameters), all_of(fast, inputs, parameters)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    ours, own = (tensors_in(one(*inputs)) for one in (fast, module))
    assert [one.stride() for one in ours] == [one.stride() for one in own]  # which views and compilers rely on
    assert lengths(fast.report) == [11] * (module.num_layers * (2 if module.bidirectional else 1))


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_kernels_and_double_backward(kind: Any) -> None:
    module = kind(3, 4, batch_first=True).double()
    x = torch.randn(2, 20, 3, dtype=torch.float64, requires_grad=True)
    fast = pcr_fx.transform(module, example_inputs=x, options={"solver": "sequential"})
    parameters = list(module.parameters())
    torch.testing.assert_close(all_of(fast, (x,), parameters), all_of(module, (x,), parameters), rtol=1e-12, atol=1e-12)
    assert "native kernel" in str(fast.report)
    seconds = []
    for run in (module, fast):
        (first,) = torch.autograd.grad(run(x)[0].square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), [x, *parameters]))
    torch.testing.assert_close(seconds[1], seconds[0], rtol=1e-10, atol=1e-10)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(2, 3), nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[1][-1])


def test_a_network_within_a_model_is_named_where_it_stands() -> None:
    model, x = Classifier().double(), torch.randn(3, 16, 2, dtype=torch.float64)
    fast = pcr_fx.transform(model, example_inputs=x, options=IN_OPS)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-12, atol=1e-12)
    (chain,) = fast.report.to_dict()["chains"]
    assert (chain["modules"], chain["body_ops"], chain["length"]) == ("rnn", ["gru_cell"], 16)
    assert "1 chain" in str(fast.report)


def test_what_is_no_faster_as_a_chain_stays_one_op() -> None:
    module, x = nn.LSTM(3, 4, num_layers=2), torch.randn(12, 2, 3)
    fast = pcr_fx.transform(module, example_inputs=x, options={"kernels": False})
    for _ in range(3):
        results, expected = tensors_in(fast(x)), tensors_in(module(x))
        assert all(torch.equal(got, one) for got, one in zip(results, expected, strict=True))
    assert all(chain["left_alone"] for chain in fast.report.to_dict()["chains"])


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_what_lies_between_chains_counts(gains: bool, training: bool, plan_cache: Any, monkeypatch: Any) -> None:
    """Its own chains are faster than PyTorch's op for each; whether that pays is found out by calling all of it."""
    measured, _ = rigged(forward_eager=2.0, forward_sequential=1.0, backward_eager=2.0, backward_sequential=1.0)
    monkeypatch.setattr(plan, "measure", measured)
    called: list[bool] = []

    def timed(run: Any, device: Any) -> float:
        run()
        called.append(run.args[0] == form.run)
        return 1.0 if called[-1] == gains else 0.5

    module, x = nn.LSTM(3, 4, num_layers=2, dropout=0.5), torch.randn(12, 2, 3)
    fast = pcr_fx.transform(module.train(training), example_inputs=x, options={"kernels": False})
    form = next(one.form for one in fast._pcr_variants[0].run.modules() if isinstance(one, recurrent.Recurrent))
    monkeypatch.setattr(recurrent, "once", timed)
    for _ in range(3):
        results, expected = (all_of(run, (x,), list(module.parameters())) for run in (fast, module))
        torch.testing.assert_close(results, expected)
    assert called == [True, False] * 5
    assert [chain["left_alone"] for chain in fast.report.to_dict()["chains"]] == [not gains] * 2


def test_other_lengths_are_other_chains_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent, "_LENGTHS", 2)
    module = nn.GRU(3, 4).double()
    fast = pcr_fx.transform(module, example_inputs=torch.randn(10, 2, 3).double(), options=IN_OPS)
    for length, told in ((10, 10), (14, 14), (18, 14), (5, 14), (10, 10)):
        x = torch.randn(length, 2, 3, dtype=torch.float64)
        torch.testing.assert_close(fast(x), module(x), rtol=1e-12, atol=1e-12)
        assert lengths(fast.report) == [told]


def test_packed_sequences_are_refused_and_short_ones_are_near_misses() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, torch.tensor([9, 7]))
            return pad_packed_sequence(self.rnn(packed)[0])[0]

    short = pcr_fx.transform(nn.GRU(3, 4), example_inputs=torch.randn(5, 2, 3))
    assert "too short: 5 steps" in str(short.report)
    x = torch.randn(9, 2, 3)
    with pytest.raises(CaptureError, match=r"a packed sequence.* is not read; pad the sequences"):
        pcr_fx.transform(Packed(), example_inputs=x)
    with pytest.raises(CaptureError, match=r"a packed sequence.* is not read; pad the sequences"):
        pcr_fx.transform(nn.GRU(3, 4), example_inputs=(pack_padded_sequence(x, torch.tensor([9, 7])),))


def test_transforms_and_autocast_see_the_op() -> None:
    module = nn.GRU(3, 4)
    x = torch.randn(12, 2, 3)
    fast = pcr_fx.transform(module, example_inputs=x, options=IN_OPS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x)[0], module(x)[0])
    primal, tangent = torch.func.jvp(lambda x: fast(x)[0], (x,), (torch.ones_like(x),))
    expected = torch.func.jvp(lambda x: module(x)[0], (x,), (torch.ones_like(x),))
    torch.testing.assert_close((primal, tangent), expected)
    with pytest.raises(RuntimeError):
        fast(x, torch.zeros(1, 3, 4))  # of another batch size


@torch._dynamo.config.patch(allow_rnn=True)
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_through_torch_compile(inner: str) -> None:
    model, x = Classifier().double(), torch.randn(3, 16, 2, dtype=torch.float64)
    compiled = torch.compile(model, backend="deeppcr", options={**IN_OPS, "inner_backend": inner}, fullgraph=True)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        all_of(compiled, (x,), parameters), all_of(model, (x,), parameters), rtol=1e-11, atol=1e-11
    )
    assert lengths(pcr_fx.report()) == [16]


def test_copies_and_pickles() -> None:
    module, x = nn.GRU(3, 4).double(), torch.randn(12, 2, 3, dtype=torch.float64)
    fast = pcr_fx.transform(module, example_inputs=x, options=IN_OPS)
    fast(x)
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(copied(x), module(x), rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            copied.weight_hh_l0.mul_(2)
        own = nn.GRU(3, 4).double()
        own.load_state_dict(copied.state_dict())
        torch.testing.assert_close(copied(x), own(x), rtol=1e-12, atol=1e-12)
        assert lengths(copied.report) == [12]
