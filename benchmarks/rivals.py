"""A chain of `benchmarks.models.Block` by others: a jitted `jax.lax.scan`, where JAX can be imported, and C++ written by hand."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Call


def columns_of(model: nn.Module) -> list[Tensor]:
    """The parameters of all blocks, one `[L, ...]` for each that a block has."""
    blocks = [list(block.parameters()) for block in model.children()]
    return [torch.stack([block[index].detach() for block in blocks]) for index in range(4)]


def jax_calls(model: nn.Module, x: Tensor) -> tuple[Call, Call] | None:
    """A forward, and one with the gradients of all parameters and of `x`; `None` without JAX."""
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        return None
    columns, start = [jnp.asarray(column.numpy()) for column in columns_of(model)], jnp.asarray(x.numpy())

    def step(z: Any, block: Any) -> tuple[Any, None]:
        w1, b1, w2, b2 = block
        return z + 0.1 * (jnp.tanh(z @ w1.T + b1) @ w2.T + b2), None

    def last(columns: Any, x: Any) -> Any:
        return jax.lax.scan(step, x, columns)[0]

    forward = jax.jit(last)
    both = jax.jit(jax.value_and_grad(lambda columns, x: last(columns, x).sum(), argnums=(0, 1)))
    assert torch.allclose(torch.tensor(forward(columns, start).tolist()), model(x), rtol=1e-3, atol=1e-4)
    return lambda: jax.block_until_ready(forward(columns, start)), lambda: jax.block_until_ready(both(columns, start))


class _Pointer(ctypes.c_void_p):
    """To the numbers of a tensor, which it keeps alive."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.data_ptr())
        self.tensor = tensor


def limit_calls(model: nn.Module, x: Tensor) -> tuple[Call, Call]:
    """`limit.cpp` for this chain and width: a forward, and one with its backward."""
    batch, width = x.shape
    lanes = 1 if batch == 1 else 16
    threads = min(torch.get_num_threads(), batch // lanes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "limit.so"
        command = "g++ -O3 -march=native -ffast-math -fopenmp -shared -fPIC -std=c++20".split()
        sizes = [f"-DW={width}", f"-DSAMPLES={batch}", f"-DTHREADS={threads}"]
        subprocess.run([*command, *sizes, str(Path(__file__).with_name("limit.cpp")), "-o", str(path)], check=True)
        library = ctypes.CDLL(str(path))
    columns = columns_of(model)
    tiled = x.view(-1, lanes, width).transpose(1, 2).contiguous()
    states, hidden = (torch.empty(len(columns[0]), *tiled.shape) for _ in range(2))
    gradients, d_x = [torch.empty_like(column) for column in columns], torch.empty_like(tiled)
    length = ctypes.c_int64(len(columns[0]))

    ahead = list(map(_Pointer, (*columns, tiled, states, hidden)))
    back = list(map(_Pointer, (columns[0], columns[2], tiled, states, hidden, *gradients, d_x)))

    def forward() -> None:
        library.forward(length, *ahead)

    def both() -> None:
        library.forward(length, *ahead)
        library.backward(length, *back)

    both()
    assert torch.allclose(states[-1].transpose(1, 2).reshape(batch, width), model(x), rtol=1e-2, atol=1e-3)
    return forward, both
