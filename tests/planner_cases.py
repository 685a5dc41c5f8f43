"""A chain to be planned, and what several tests of planning need beside it."""

from typing import Any

import torch
from torch import Tensor, nn

from pcr_fx.planner import plan

# What a file of measurements may hold.
CHAIN = {
    "modules": "layers",
    "source": "a.py:1",
    "length": 20,
    "dimension": 3,
    "samples": 4,
    "dtype": "torch.float32",
    "device": "cpu",
    "torch": "2.13.0",
}
TIMING = {
    "way": "eager",
    "direction": "forward",
    "seconds": 1e-3,
    "iterations": 0,
    "note": "",
    "skipped": False,
    "points": [[5, 0.25e-3], [10, 0.5e-3]],
    "spread": 1.2,
    "disturbed": False,
    "adding": None,
}


class Net(nn.Module):
    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(length)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(length)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.1 * torch.tanh(layer(x))
        return x


def in_ops(**options: Any) -> dict[str, Any]:
    """Without kernels nothing is compiled, which takes longer than all else here."""
    return {"kernels": False, **options}


def chain_of(fast: Any) -> dict[str, Any]:
    (chain,) = fast.report.to_dict()["chains"]
    return chain


def rigged(**seconds: float) -> Any:
    """`measure` with an outcome of its own: `forward_newton=1e-3`, say."""
    calls = []

    def measured(case: Any, settings: Any, call: Any, needs_gradient: bool, *_: Any) -> Any:
        calls.append(needs_gradient)
        named = ((name.partition("_"), value) for name, value in seconds.items())
        return tuple(
            plan.Timing(way, direction, value, iterations=3 if way == "newton" else 0)
            for (direction, _, way), value in named
            if needs_gradient or direction == "forward"
        )

    return measured, calls
