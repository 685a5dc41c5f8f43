"""Functions of the language of kernels, printed in C++ without a chain around them, and called."""

import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pcr_fx.codegen import Function
from pcr_fx.targets.cpp import build, source
from pcr_fx.targets.cpp.kernel import _VECTOR_BYTES
from pcr_fx.targets.cpp.printer import print_function

# What lanes of vectors are, as headers have it: features, which compilers find, or samples.
LANES = ("real", "vec")

_DRIVER = """
void apply_all(const int64_t* call) {
  for (int64_t t = 0; t < call[0]; ++t) apply<VARYING>(CALL);
}
}
extern "C" __attribute__((visibility("default"))) void run(const int64_t* call) { apply_all(call); }
"""


def call_compiled(function: Function, inputs: Sequence[Tensor], lanes: str) -> list[Tensor]:
    """The outputs of a function `[samples, size]`, of which each sample has all inputs `[samples, size]` for itself."""
    dtype = inputs[0].dtype
    width = 1 if lanes == "real" else _VECTOR_BYTES // dtype.itemsize
    given = [_tiled(tensor, width) for tensor in inputs]
    tiles = len(given[0])
    results = [aligned(given[0].new_empty(tiles, out.size, width)) for out in function.outputs]
    run = build.load(_source(function, dtype, lanes)).run
    words = [tiles, *(tensor.data_ptr() for tensor in (*given, *results))]
    run(struct.pack(f"{len(words)}q", *words))
    return [out.transpose(1, 2).reshape(tiles * width, -1)[: len(inputs[0])] for out in results]


def _source(function: Function, dtype: torch.dtype, lanes: str) -> str:
    places = [(f"const {lanes}*", one.size) for one in function.inputs] + [
        (f"{lanes}*", one.size) for one in function.outputs
    ]
    call = [f"reinterpret_cast<{kind}>(call[{1 + index}]) + t * {size}" for index, (kind, size) in enumerate(places)]
    return "\n".join(
        [
            f"#define REAL {source.REALS[dtype]}",
            f"#define VARYING {lanes}",
            "#define ALONE false",
            (Path(source.__file__).parent / "native" / "numbers.h").read_text(),
            print_function("apply", function),
            _DRIVER.replace("CALL", ", ".join(call)),
        ]
    )


def _tiled(tensor: Tensor, width: int) -> Tensor:
    """`[samples, size]` as `[tiles, size, width]`; lanes without a sample are 1."""
    filled = torch.cat([tensor, tensor.new_ones(-len(tensor) % width, tensor.shape[1])])
    return aligned(filled.reshape(-1, width, tensor.shape[1]).transpose(1, 2))


def aligned(tensor: Tensor) -> Tensor:
    """As vectors have to be."""
    room = tensor.new_empty(tensor.numel() + 16)
    start = -(room.data_ptr() % -64) // room.element_size()
    assert (room.data_ptr() + start * room.element_size()) % 64 == 0
    return room[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
