"""What of its tensors decides where a call of a chain goes: shapes, dtypes, classes, and what is refused for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from pcr_fx.body import Signature
from pcr_fx.chain import TensorSpec
from pcr_fx.errors import BodyError
from pcr_fx.operands import Operand, dtype_of, first_part, is_ordinary, is_plain, parts_of
from pcr_fx.targets import PointerTable

# Solved in float32: Newton needs digits to converge by, and a state in float16 or bfloat16 has two or three.
_LOW_PRECISION = (torch.float16, torch.bfloat16)
SOLVED_DTYPES = (torch.float32, torch.float64)


def plain_look(
    states: Sequence[Tensor], seen: Sequence[Tensor | PointerTable], shared: Sequence[Tensor]
) -> tuple[Any, ...] | None:
    """All that decides where a plain call goes; `None` for tensors that native code cannot read as they are.

    Args:
        seen: the look of each per-block operand.
    """
    looks: list[Any] = [torch.is_grad_enabled()]
    for tensor in (*states, *seen, *shared):
        if type(tensor) is PointerTable:
            looks.append((tensor.shape, tensor.dtype))
        elif is_plain(tensor):
            looks.append((tensor.shape, tensor.dtype, tensor.device))
        else:
            return None
    return tuple(looks)


def dtypes_of(
    states: Sequence[Tensor], operands: Sequence[Operand], shared: Sequence[Tensor]
) -> tuple[torch.dtype, ...]:
    return tuple(dtype_of(tensor) for tensor in (*states, *operands, *shared))


def every_tensor(states: Sequence[Tensor], operands: Sequence[Operand], shared: Sequence[Tensor]) -> list[Tensor]:
    """All tensors of a call. What is stacked stays so: apart, a compiler would see each part."""
    each = ([operand] if isinstance(operand, Tensor) else parts_of(operand) for operand in operands)
    return [*states, *(part for parts in each for part in parts), *shared]


def have_batched_tangents(states: Sequence[Tensor], operands: Sequence[Operand], shared: Sequence[Tensor]) -> bool:
    """Whether dual numbers have many tangents at once, as `torch.autograd.functional.jacobian` has them: by a `vmap` of its own."""
    if forward_ad._current_level < 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    tangents = (forward_ad.unpack_dual(tensor).tangent for tensor in every_tensor(states, operands, shared))
    return any(tangent is not None and is_legacy_batchedtensor(tangent) for tangent in tangents)


def refuse_unusual(tensors: Iterable[Tensor | None]) -> BodyError | None:
    """Why such tensors are left to the model's own ops, if some are of a class with others; `None` is one not known yet."""
    for tensor in tensors:
        if tensor is not None and not is_ordinary(tensor):
            return BodyError(f"its blocks are given a {type(tensor).__name__}, a class of tensors with ops of its own")
    return None


def refuse_mixed(dtypes: Sequence[torch.dtype], device: str) -> BodyError | None:
    """Why such tensors are left to the model's own ops, if they are: each then computes in a dtype of its own, or refuses."""
    floating = sorted({str(dtype) for dtype in dtypes if dtype.is_floating_point})
    if len(floating) < 2 or not any(dtype in _LOW_PRECISION for dtype in dtypes) or autocast_dtype(device) is not None:
        return None
    return BodyError(f"its tensors are {' and '.join(floating)}, without autocast")


def autocast_dtype(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def signature_of(states: Sequence[Tensor], operands: Sequence[Operand], shared: Sequence[Tensor]) -> Signature:
    """What a plan for these tensors is made for; per-block operands come stacked, `[L, ...]`, or in parts."""

    def spec(tensor: Tensor, shape: Sequence[int]) -> TensorSpec:
        return TensorSpec(tuple(int(size) for size in shape), solved_dtype(tensor.dtype), tensor.device)

    def block(operand: Operand) -> TensorSpec:
        if isinstance(operand, Tensor):
            return spec(operand, operand.shape[1:])
        part = first_part(operand)
        return spec(part, part.shape)

    return Signature(
        tuple(spec(tensor, tensor.shape) for tensor in states),
        tuple(map(block, operands)),
        tuple(spec(tensor, tensor.shape) for tensor in shared),
    )


def solved_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a tensor is solved in."""
    return torch.float32 if dtype in _LOW_PRECISION else dtype


def raised(tensor: Tensor) -> Tensor:
    return tensor.to(solved_dtype(tensor.dtype))
