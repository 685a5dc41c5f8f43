"""`python -m benchmarks.compile_time`: how long deep models take to compile, and run, against plain Inductor.

Of each model, forward alone and a training step: seconds until the first call has returned, Dynamo's tracing included, with
nothing on disk, and milliseconds of later calls, made in turn. Blocks are too wide for a kernel, or no chain: what is compared is
the whole graph with one body for all blocks. `--models`, `--layers` and `--modes` choose a part; by default it takes an hour.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import pcr_fx
from benchmarks.measure import least_ms, record

BACKENDS: dict[str, Any] = {"inductor": None, "deeppcr": {"regions": True}}
MODES = ("forward", "training")


class GPTBlock(nn.Module):
    """Attention and a perceptron, each behind a layer norm and around it a residual, as in GPT-2."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed, self.projected = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.dropout = heads, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.mixed(self.first_norm(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.projected(attended))
        return x + self.dropout(self.down(F.gelu(self.up(self.second_norm(x)))))


class ResNetBlock(nn.Module):
    """Two convolutions with batch norm, and a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.convolutions[0](x)))
        return F.relu(x + self.norms[1](self.convolutions[1](y)))


class PerceptronBlock(nn.Module):
    """A layer, and a residual: as little as a block may be."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.layer(self.norm(x)))


def _stack(block: Callable[[], nn.Module], layers: int) -> nn.Module:
    return nn.Sequential(*(block() for _ in range(layers)))


# By name: a stack of so many blocks, and the shape of its input.
MODELS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "GPT, width 128": (lambda layers: _stack(lambda: GPTBlock(128, 4), layers), (2, 64, 128)),
    "GPT, width 128, dropout": (lambda layers: _stack(lambda: GPTBlock(128, 4, 0.1), layers), (2, 64, 128)),
    "ResNet stage, width 64": (lambda layers: _stack(lambda: ResNetBlock(64), layers), (4, 64, 14, 14)),
    "perceptron, width 512": (lambda layers: _stack(lambda: PerceptronBlock(512), layers), (32, 512)),
}


def _step(run: Callable[..., Any], model: nn.Module, x: Tensor, mode: str) -> Callable[[], Any]:
    def forward() -> None:
        with torch.no_grad():
            run(x)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        run(x).square().mean().backward()

    return forward if mode == "forward" else train


def compare(name: str, layers: int, mode: str) -> tuple[list[float], list[float], int]:
    """For each backend the seconds to compile and the least milliseconds of a call; the blocks that were compiled once."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = make(layers).train(mode == "training"), torch.randn(shape)
    seconds, steps = [], []
    torch._dynamo.reset()
    for backend in BACKENDS:
        with fresh_cache():
            step = _step(torch.compile(model, backend=backend, options=BACKENDS[backend]), model, x, mode)
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        steps.append(step)
    regions = sum(region.length for region in pcr_fx.report().regions)
    return seconds, least_ms(steps, rounds=20), regions


def _warm_up() -> None:
    """Have Inductor import and try out all that it does once in a process."""
    with fresh_cache():
        layer = nn.Linear(8, 8)
        torch.compile(layer)(torch.randn(4, 8)).tanh().sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layers", type=int, nargs="+", default=(24, 96))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--discard", action="store_true", help="print, and keep no record")
    arguments = parser.parse_args()
    _warm_up()
    rows = []
    for name in arguments.models:
        for layers in arguments.layers:
            for mode in arguments.modes:
                seconds, milliseconds, regions = compare(name, layers, mode)
                ratios = seconds[1] / seconds[0], milliseconds[1] / milliseconds[0]
                rows.append((name, layers, mode, *seconds, ratios[0], *milliseconds, ratios[1], regions))
                print(*rows[-1], sep=" | ", flush=True)
    headers = (
        *("model", "L", "mode", "Inductor, s", "deeppcr, s", "ratio"),
        *("Inductor, ms", "deeppcr, ms", "ratio", "blocks compiled once"),
    )
    notes = "Seconds of the first call, nothing on disk, imports apart; the least milliseconds of calls made in turn. One run."
    if not arguments.discard:
        record("compile_time", "Compiling deep models, float32", headers, rows, notes)


if __name__ == "__main__":
    main()
