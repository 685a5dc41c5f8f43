"""Run an exhibit through one of the two ways in, and compare it with the model as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comparison import relative_error, value_and_gradients
from torch import Tensor, nn

import pcr_fx
from zoo.models import Exhibit

DIALECTS = ("tracer", "Dynamo")


@dataclass(frozen=True)
class Seen:
    """What was found in an exhibit, and how near its results are to the model's own, relative to their size."""

    ops: int
    chains: tuple[int, ...]
    depth: int
    depth_in_chains: int
    reasons: tuple[str, ...]
    error: float
    gradient_error: float


def examine(exhibit: Exhibit, dialect: str, solver: str = "sequential") -> Seen:
    """Rewrite an exhibit and run it, forward and backward."""
    model, inputs = exhibit.build()
    options = {"solver": solver}
    torch._dynamo.reset()
    fast: Callable[..., Tensor]
    if dialect == "tracer":
        fast = pcr_fx.transform(model, inputs, options)
    else:
        fast = torch.compile(model, backend="deeppcr", options={**options, "inner_backend": "eager"})
    got, expected = _results(fast, model, inputs), _results(model, model, inputs)
    report = (pcr_fx.report(fast) if isinstance(fast, pcr_fx.explicit.TransformedModule) else pcr_fx.report()).to_dict()
    errors = [relative_error(a, b) for a, b in zip(got, expected, strict=True)]
    return Seen(
        report["ops"],
        tuple(chain["length"] for chain in report["chains"]),
        report["depth"],
        report["depth_in_chains"],
        tuple(f"{miss['modules']} {miss['reason']}" for miss in report["rejected"]),
        errors[0],
        max(errors[1:]),
    )


def _results(run: Callable[..., Any], model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The output, and the gradients of a fixed weighting of it in the inputs and all parameters."""
    torch.manual_seed(1)
    output, *gradients = value_and_gradients(run, list(model.parameters()), *inputs)
    return [output, torch.cat([one.flatten() for one in gradients])]
