"""A training step of the network of `examples/train_resnet.py`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import pcr_fx
from benchmarks.gpu.problem import DEVICE, Measured, error
from benchmarks.gpu.timing import median_us
from benchmarks.models import classifier

WIDTH = 8
# On a CPU nothing is measured, and no compiler is waited for.
_IN_EARNEST: dict[str, object] = {"min_length": 2}
_OPTIONS = (
    _IN_EARNEST if torch.cuda.is_available() else {**_IN_EARNEST, "inner_backend": "eager", "planning": "estimated"}
)
# How a model is called for training, and the module that is trained then.
Way = Callable[[nn.Module, Tensor], tuple[nn.Module, Callable[[Tensor], Tensor]]]


def _packed(model: nn.Module, x: Tensor) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    fast = pcr_fx.transform(model, (x,), options=_OPTIONS, pack_parameters=True)
    return fast, fast


def _compiled(model: nn.Module, x: Tensor) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    torch._dynamo.reset()
    return model, torch.compile(model, backend="deeppcr", options=_OPTIONS)


_WAYS: dict[str, tuple[str, Way]] = {
    "eager": ("eager", lambda model, x: (model, model)),
    "packed": ("transform(..., pack_parameters=True)", _packed),
    "compiled": ('torch.compile(backend="deeppcr")', _compiled),
}


def _step(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Callable[[], None]:
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        optimiser.zero_grad()
        nn.functional.cross_entropy(call(x), y).backward()
        optimiser.step()

    return run


@functools.cache
def measure(way: str, length: int, batch: int) -> Measured:
    """A step one way."""
    name, prepare = _WAYS[way]
    model = classifier(length, WIDTH).to(DEVICE)
    x, y = torch.randn(batch, 64, device=DEVICE), torch.randint(10, (batch,), device=DEVICE)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
    trained, call = prepare(model, x)
    off = error([call(x).detach()], [exact])
    return Measured(name, median_us(_step(trained, call, x, y)), off)


def ours_and_eager(ours: str, length: int, batch: int) -> tuple[Measured, Measured]:
    return measure(ours, length, batch), measure("eager", length, batch)
