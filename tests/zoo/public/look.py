"""Run an exhibit through one of the two ways in: what is found in it, whether it is right, and how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comparison import relative_error, value_and_gradients
from torch import Tensor, nn

import pcr_fx
from zoo.public.exhibit import Exhibit

WAYS = ("transform", "torch.compile")
_ROUNDS = 15


@dataclass(frozen=True)
class Look:
    """What came of it.

    Attributes:
        chain: blocks of the longest chain.
        kernel: whether native code runs it.
        words: why there is none, or no kernel.
        error: of results and gradients, relative to the model's own.
        forward, training: how many times as fast as the model as it is; minima of interleaved calls.
        first: seconds of the first call, the transform included.
    """

    chain: int = 0
    kernel: bool = False
    words: str = ""
    error: float = 0.0
    forward: float = 1.0
    training: float | None = None
    first: float = 0.0


def look_at(exhibit: Exhibit, way: str, options: dict[str, Any] | None = None, timed: bool = True) -> Look:
    """Everything that there is to see.

    Args:
        way: one of `WAYS`.
        options: as for either way in.
    """
    torch._dynamo.reset()
    model, inputs = exhibit.build()
    _results(model, model, inputs)  # some keep what they make at the first call
    began = time.perf_counter()
    try:
        fast = _rewritten(model, inputs, way, options or {})
        with torch.no_grad():
            _seeded(fast, inputs)
    except pcr_fx.PcrFxError as error:
        return Look(words=str(error))
    first = time.perf_counter() - began
    got, expected = (_results(run, model, inputs) for run in (fast, model))
    report = pcr_fx.report(fast) if way == WAYS[0] else pcr_fx.report()
    chains, rejected = (report.to_dict()[name] for name in ("chains", "rejected"))
    longest = max(chains, key=lambda chain: chain["length"], default=None)
    if longest is None:
        words = rejected[0]["reason"] if rejected else "nothing in it repeats"
    else:
        words = "" if longest["native_forward"] else _why_no_kernel(longest)
    error = max((_relative(one, other) for one, other in zip(got, expected, strict=True)), default=0.0)
    forward, training = _speeds(fast, model, inputs, len(expected) > 1) if timed else (1.0, None)
    chain, kernel = (0, False) if longest is None else (longest["length"], longest["native_forward"])
    return Look(chain, kernel, words, error, forward, training, first)


def _rewritten(model: nn.Module, inputs: Sequence[Tensor], way: str, options: dict[str, Any]) -> Callable[..., Any]:
    if way == WAYS[0]:
        return pcr_fx.transform(model, example_inputs=tuple(inputs), options=options)
    return torch.compile(model, backend="deeppcr", options={**options, "inner_backend": "eager"})


def _why_no_kernel(chain: dict[str, Any]) -> str:
    notes = [timing["note"] for timing in chain["timings"] if "kernel" in timing["way"] and timing["note"]]
    return notes[0] if notes and not chain["left_alone"] else chain["reason"]


def _seeded(run: Callable[..., Any], inputs: Sequence[Tensor]) -> Tensor:
    torch.manual_seed(5)
    return run(*inputs)


def _results(run: Callable[..., Any], model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The result and the gradients of a weighting of it, as far as there are any."""
    torch.manual_seed(5)
    return value_and_gradients(run, [one for one in model.parameters() if one.requires_grad], *inputs)


def _relative(got: Tensor, expected: Tensor) -> float:
    """As `relative_error`; of what is nearly nothing, the difference itself."""
    if not expected.numel() or expected.abs().max() > 1e-3:
        return relative_error(got, expected)
    return float((got - expected).abs().max().detach())


def _speeds(
    fast: Callable[..., Any], model: nn.Module, inputs: Sequence[Tensor], trains: bool
) -> tuple[float, float | None]:
    with torch.no_grad():
        forward = _ratio(lambda: _seeded(model, inputs), lambda: _seeded(fast, inputs))
    if not trains:
        return forward, None
    return forward, _ratio(lambda: _results(model, model, inputs), lambda: _results(fast, model, inputs))


def _ratio(own: Callable[[], Any], ours: Callable[[], Any]) -> float:
    """Of the least times of calls in turn, after some for what is measured at first calls."""
    for _ in range(3):
        own(), ours()
    taken = [[_seconds(own), _seconds(ours)] for _ in range(_ROUNDS)]
    return min(one for one, _ in taken) / min(other for _, other in taken)


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
