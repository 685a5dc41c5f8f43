"""The language of kernels, evaluated by PyTorch: what every printed kernel is to compute, for reading and for tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pcr_fx.codegen.functions import FUNCTIONS
from pcr_fx.codegen.ir import Buffer, Constant, Expression, Function, Load, Loop, View, places

Memory = dict[str, Tensor]


def interpret(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of `function` for all samples.

    Args:
        inputs: of one dtype; `[samples, size]` where a buffer is varying, else `[size]`.

    Returns:
        The outputs: `[samples, size]` where a buffer is varying, else `[size]`, a sum over the samples.
    """
    samples = next((len(tensor) for buffer, tensor in zip(function.inputs, inputs, strict=True) if buffer.varying), 1)
    memory: Memory = {buffer.name: tensor for buffer, tensor in zip(function.inputs, inputs, strict=True)}
    for buffer in function.constants:
        memory[buffer.name] = inputs[0].new_tensor(buffer.values)
    for buffer in function.locals:
        # NaN, so that nobody reads what nobody wrote.
        memory[buffer.name] = inputs[0].new_full(_shape(buffer, samples), torch.nan)
    for buffer in function.outputs:
        memory[buffer.name] = inputs[0].new_full(_shape(buffer, samples), torch.nan if buffer.varying else 0)
    sums = {buffer.name for buffer in function.outputs if not buffer.varying}
    for loop in function.loops:
        value = _value(loop, memory, samples)
        place, out = _places(loop.out, loop.shape), memory[loop.out.buffer.name]
        if loop.out.buffer.name in sums:
            out[place] += value.sum(0)
        else:
            out[..., place] = value if loop.out.buffer.varying else value[0]
    return [memory[buffer.name] for buffer in function.outputs]


def _places(view: View, shape: Sequence[int]) -> Tensor:
    return torch.from_numpy(places(view, shape))


def _shape(buffer: Buffer, samples: int) -> tuple[int, ...]:
    return (samples, buffer.size) if buffer.varying else (buffer.size,)


def _value(loop: Loop, memory: Memory, samples: int) -> Tensor:
    """What a loop computes, `[samples, *loop.shape]`."""
    space = (*loop.shape, *loop.reduced)
    value = _evaluate(loop.value, space, memory).expand(samples, *space)
    if not loop.reduced:
        return value
    axes = tuple(range(1 + len(loop.shape), value.dim()))
    if value.numel() == 0:
        return value.new_full((samples, *loop.shape), loop.reduction.start)
    return loop.reduction.twin(value, axes)


def _evaluate(value: Expression, space: tuple[int, ...], memory: Memory) -> Tensor:
    """An expression over the indices of `space`, perhaps for each sample: `[*space]` or `[samples, *space]`."""
    if isinstance(value, Load):
        return memory[value.view.buffer.name][..., _places(value.view, space)]
    if isinstance(value, Constant):
        return next(iter(memory.values())).new_tensor(value.value)
    return FUNCTIONS[value.function].evaluate(*(_evaluate(argument, space, memory) for argument in value.arguments))
