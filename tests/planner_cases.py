"""A chain to be planned, and what several tests of planning need beside it."""

from typing import Any

import torch
from torch import Tensor, nn

from pcr_fx.planner import plan


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
