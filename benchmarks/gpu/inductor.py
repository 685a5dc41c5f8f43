"""`torch.compile(mode="reduce-overhead")` of the residual chain, in a process of its own that can be cut off.

    python -m benchmarks.gpu.inductor BACKEND WIDTH LENGTH...

Prints a line of JSON for each length, as soon as it is measured.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from benchmarks.gpu.problem import DEVICE
from benchmarks.gpu.timing import median_us
from benchmarks.models import residual_net


def measure(backend: str, width: int, length: int) -> dict[str, float]:
    model, x = residual_net(length, width).to(DEVICE), torch.randn(1, width, device=DEVICE)
    torch._dynamo.reset()
    mode = "reduce-overhead" if backend == "inductor" else None
    compiled = torch.compile(model, backend=backend, mode=mode)
    began = time.perf_counter()
    with torch.no_grad():
        for _ in range(3):  # compiled, warmed up, recorded
            compiled(x)
        seconds = time.perf_counter() - began
        us = median_us(lambda: compiled(x))
        exact = model.double()(x.double())
        model.float()
        error = float((compiled(x).double() - exact).abs().max() / exact.abs().max())
    return {"length": length, "us": us, "compile_s": seconds, "error": error}


if __name__ == "__main__":
    backend, width, *lengths = sys.argv[1:]
    for length in lengths:
        print(json.dumps(measure(backend, int(width), int(length))), flush=True)
