"""Registers, spills and shared memory of the GPU kernels, compiled for sm_90: no GPU is needed.

    python -m benchmarks.gpu_resources [--widths 1 4 64] [--most-spilled BYTES]

The chain is that of `benchmarks.models`, 1,024 blocks in float32. Fails where a kernel spills more than is allowed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # what is interpreted is not compiled

import torch
import triton
from tabulate import tabulate
from torch import fx
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.models import residual_block
from pcr_fx.body import Signature, build_program
from pcr_fx.chain import Chain, TensorSpec
from pcr_fx.targets.triton import TritonKernel
from pcr_fx.targets.triton.launches import Launch

LENGTH = 1024


def kernel(width: int, dtype: torch.dtype = torch.float32) -> TritonKernel:
    """The GPU kernels of the chain of `benchmarks.models`."""

    def spec(*shape: int) -> TensorSpec:
        return TensorSpec(shape, dtype, torch.device("cpu"))

    operands = (spec(width, width), spec(width), spec(width, width), spec(width))
    chain = Chain(fx.symbolic_trace(residual_block), LENGTH, num_operands=4)
    return TritonKernel.of(build_program(chain, Signature((spec(2, width),), operands, ())))


def resources(launch: Launch) -> list[object]:
    """Warps, registers a thread, bytes of stack (what is spilled), bytes of shared memory, seconds to compile."""
    began = time.perf_counter()
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    # As at a launch: tensors start where several numbers can be read at once.
    pointers = [index for index, kind in enumerate(launch.signature.values()) if kind.startswith("*")]
    aligned = {(index,): [["tt.divisibility", 16]] for index in pointers}
    source = ASTSource(launch.function, launch.signature, launch.constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(tool), "--dump-resource-usage", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (max(map(int, re.findall(rf"{name}:(\d+)", text))) for name in ("REG", "STACK"))
    return [launch.warps, registers, stack, compiled.metadata.shared, round(seconds, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 3, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--most-spilled", type=int, default=64)
    arguments = parser.parse_args()
    rows = []
    for width in arguments.widths:
        for launch in kernel(width).launches():
            rows.append([width, launch.name, launch.constants, *resources(launch)])
            print(*rows[-1], file=sys.stderr)
    headers = ["width", "kernel", "constants", "warps", "registers", "spilled, bytes", "shared, bytes", "seconds"]
    print(tabulate(rows, headers, tablefmt="github"))
    worst = max(row[5] for row in rows)
    if worst > arguments.most_spilled:
        sys.exit(f"a kernel spills {worst} bytes, more than {arguments.most_spilled}")


if __name__ == "__main__":
    main()
