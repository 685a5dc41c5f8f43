"""What native code writes as it goes through a chain: states or outputs of all blocks, in memory of whoever they are for."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

# Where a result goes that nobody wants, or its cotangents where there are none: the words of `Result` in call.h.
NOWHERE = (0, 0, 0, 0, 0, 0)

Words = tuple[int, int, int, int, int, int]
Strides = tuple[int, int, int, int]


def result_strides(whole: Tensor, batch_dims: Sequence[int]) -> Strides | None:
    """How `[L, ...]` lies, as `Result` in call.h has it; `None` where it cannot say it.

    Args:
        batch_dims: which dimensions of a block's part tell samples apart.
    """
    sizes, strides = whole.shape[1:], whole.stride()[1:]
    features = _joined(sizes, strides, [dim for dim in range(len(sizes)) if dim not in batch_dims])
    rows = _joined(sizes, strides, batch_dims)
    if len(features) > 1 or len(rows) > 2 or any(stride != 1 for _, stride in features):
        return None
    item = whole.element_size()
    (many, sample), (_, row) = [*rows[::-1], (0, 0), (0, 0)][:2]
    return whole.stride(0) * item, sample * item, row * item, many if len(rows) == 2 else 0


def _joined(sizes: Sequence[int], strides: Sequence[int], dims: Sequence[int]) -> list[tuple[int, int]]:
    """Size and stride of the fewest dimensions that these are."""
    joined: list[tuple[int, int]] = []
    for dim in dims:
        if sizes[dim] == 1:
            continue
        if joined and joined[-1][1] == sizes[dim] * strides[dim]:
            joined[-1] = joined[-1][0] * sizes[dim], strides[dim]
        else:
            joined.append((sizes[dim], strides[dim]))
    return joined


def cotangent_words(
    cotangent: Tensor | Mapping[int, Tensor] | None, batch_dims: Sequence[int], size: int, length: int
) -> tuple[Words, Any]:
    """How native code is told of the cotangents of a result, and what is to be kept until the call is over.

    Args:
        cotangent: of all blocks, `[L, ...]`; or of some, by block.
        size: numbers a sample.
    """
    if cotangent is None:
        return NOWHERE, None
    if isinstance(cotangent, Tensor):
        strides = result_strides(cotangent, batch_dims)
        if strides is None:
            cotangent = in_order(cotangent, batch_dims)
            strides = result_strides(cotangent, batch_dims)
            assert strides is not None, "what lies in order can be told"
        return (cotangent.data_ptr(), *strides, 0), cotangent
    if not cotangent:
        return NOWHERE, None
    table = (ctypes.c_void_p * length)()
    parts = {block: in_order(part.unsqueeze(0), batch_dims) for block, part in cotangent.items()}
    for block, part in parts.items():
        table[block] = part.data_ptr()
    step = size * next(iter(parts.values())).element_size()
    return (0, 0, step, 0, 0, ctypes.addressof(table)), (table, parts)


def in_order(whole: Tensor, batch_dims: Sequence[int]) -> Tensor:
    """The same numbers where samples lie one behind the other."""
    order = [0, *(1 + dim for dim in batch_dims)]
    order += [dim for dim in range(whole.dim()) if dim not in order]
    back = [order.index(dim) for dim in range(whole.dim())]
    return whole.permute(order).contiguous().permute(back)
