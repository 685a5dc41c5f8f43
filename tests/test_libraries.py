"""Models that libraries make, as they are: the chain is found, and the numbers are the library's own.

Skipped where a library is absent.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pcr_fx

OPTIONS = {"solver": "sequential", "kernels": False, "inner_backend": "eager"}


class Calling(nn.Module):
    """A function of what it holds and is given."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def torchdiffeq_fixed_steps() -> Any:
    odeint = pytest.importorskip("torchdiffeq").odeint

    def run(self: Any, y: Tensor) -> Tensor:
        grid = torch.linspace(0, 1, 13, dtype=y.dtype)
        return odeint(lambda _, y: self.field(y), y, grid, method="midpoint")

    return Calling(run, field=nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))), (torch.randn(2, 3),)


def torchcde_spline() -> Any:
    torchcde = pytest.importorskip("torchcde")

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 6)

        def forward(self, _: Any, z: Tensor) -> Tensor:
            return torch.tanh(self.linear(z)).view(*z.shape, 2)

    def run(self: Any, coefficients: Tensor) -> Tensor:
        path = torchcde.CubicSpline(coefficients)
        z0 = self.start(path.evaluate(path.interval[0]))
        options = {"step_size": 1.0}
        return torchcde.cdeint(path, self.field, z0, path.interval, adjoint=False, method="euler", options=options)

    coefficients = torchcde.natural_cubic_coeffs(torch.randn(2, 13, 2, dtype=torch.float64))
    return Calling(run, field=Field(), start=nn.Linear(2, 3)), (coefficients,)


def snntorch_neurons() -> Any:
    snn = pytest.importorskip("snntorch")

    def run(self: Any, x: Tensor) -> Tensor:
        membrane, found = torch.zeros(x.shape[1], 4, dtype=x.dtype), []
        for step in x:
            spikes, membrane = self.neuron(self.linear(step), membrane)
            found.append(spikes)
        return torch.stack(found)

    return Calling(run, linear=nn.Linear(3, 4), neuron=snn.Leaky(beta=0.9)), (torch.randn(13, 2, 3),)


def ncps_liquid() -> Any:
    torch_ncps = pytest.importorskip("ncps.torch")
    return torch_ncps.CfC(3, 4, batch_first=True), (torch.randn(2, 13, 3),)


def crf() -> Any:
    torchcrf = pytest.importorskip("torchcrf")
    return torchcrf.CRF(4, batch_first=True), (torch.randn(2, 13, 4), torch.randint(0, 4, (2, 13)))


def holds_the_chain(report: pcr_fx.RewriteReport) -> bool:
    """Whether all steps are blocks, but for one that may differ."""
    return any(chain["length"] >= 12 for chain in report.to_dict()["chains"])


CASES = [torchdiffeq_fixed_steps, torchcde_spline, snntorch_neurons, ncps_liquid, crf]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_transform_reads_it(case: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model, inputs = case()
    model = model.double()
    inputs = tuple(one.double() if one.is_floating_point() else one for one in inputs)
    fast = pcr_fx.transform(model, example_inputs=inputs, options=OPTIONS)
    assert holds_the_chain(fast.report), str(fast.report)
    results = []
    for run in (model, fast):
        found = run(*inputs)
        y = found[0] if isinstance(found, tuple) else found
        parameters = [one for one in model.parameters() if one.requires_grad]
        gradients = torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)
        results.append([y, *(one for one in gradients if one is not None)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


def test_torch_compile_reads_neurons() -> None:
    torch._dynamo.reset()
    model, inputs = snntorch_neurons()
    compiled = torch.compile(model, backend="deeppcr", options=OPTIONS)
    torch.testing.assert_close(compiled(*inputs), model(*inputs))
    assert holds_the_chain(pcr_fx.report())
