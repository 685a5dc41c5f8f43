"""Bodies and their pullbacks as the graphs that are lowered, without a chain around them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from pcr_fx.body.sample import _trace_functional
from pcr_fx.body.tracer import trace


def traced(function: Callable[..., Any], inputs: Sequence[Tensor], decomposed: bool = False) -> fx.GraphModule:
    """The graph of a function of one sample; `decomposed` to the ops that a body is lowered from."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(tensor) for tensor in inputs]
        return _trace_functional(function, fake) if decomposed else trace(function, fake, {})


def pullback_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """`(*inputs, cotangent) -> cotangents`."""
    return lambda *given: torch.func.vjp(function, *given[:-1])[1](given[-1])
