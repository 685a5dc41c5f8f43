"""Compiles the GPU's kernels for sm_90 from the very calls that would launch them; needs no GPU.

Triton compiles a kernel for the arguments of a call: `None` for a pointer, a Python number for a float. Here each call is
made with tensors on the CPU, and ends where the kernel would be launched.
"""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)  # what is interpreted is not compiled

from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.gpu_resources import kernel
from pcr_fx.targets import TritonKernel


class NoGPU:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only() -> list[str]:
    """From now on calls only compile; the list names the kernels."""
    driver.set_active(NoGPU())  # type: ignore[arg-type]
    run, compiled = JITFunction.run, list[str]()

    def compile_it(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(self.__name__)
        return run(self, *args, warmup=True, **kwargs)

    JITFunction.run = compile_it
    return compiled


def call_everything(fused: TritonKernel) -> None:
    def filled(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=fused.program.dtype)

    length, d = fused.program.length, fused.body.dimension
    initial, trajectory = filled(2, d), filled(length, 2, d)
    operands = [filled(length, *spec.shape) for spec in fused.program.signature.operands]
    call = fused.program.call_with(initial, operands, [])
    fused.solve(call)
    for fall_back in (True, False):
        fused.solve_newton(call, 1e-6, 10, fall_back)
    for solver in ("newton", "sequential"):
        fused.solve_adjoint(call, trajectory, trajectory, solver)


if __name__ == "__main__":
    names = compile_only()
    for dtype in (torch.float32, torch.float64):
        for width in (1, 6):  # scalars, tiles
            call_everything(kernel(width, dtype))
    print(*names)
