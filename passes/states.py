"""What blocks may hand on: real numbers, and truth values and whole numbers beside them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from pcr_fx.chain import TensorSpec
from pcr_fx.passes.bindings import Broken, OpSequence
from pcr_fx.passes.kinds import say_spec

_WHOLE = (torch.bool, torch.int8, torch.int16, torch.int32, torch.int64)


def whole_dtype(values: Iterable[Any]) -> torch.dtype | None:
    """The dtype of truth values or whole numbers, if all of `values` have the same."""
    dtypes = {value.dtype if isinstance(value, torch.Tensor) else None for value in values}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    return dtype if dtype in _WHOLE else None


def check_state(sequence: OpSequence, before: fx.Node, after: fx.Node, with_reals: bool) -> None:
    """A state has one shape before and after each block, and is floating or complex, or of truth values or whole numbers.

    Args:
        with_reals: whether some state is of real numbers, beside which others are carried.

    Raises:
        Broken: it is something else.
    """
    values = [sequence.value(node) for node in (before, after)]
    if not (with_reals and whole_dtype(values) is not None):
        for value in values:
            if value is not None and not (isinstance(value, torch.Tensor) and TensorSpec.of(value).is_differentiable):
                got = say_spec(sequence.kinds.spec(before))
                raise Broken(1, f"the value carried from block to block is no floating tensor but {got}")
    old, new = sequence.kinds.spec(before), sequence.kinds.spec(after)
    if old is None or new is None:
        return
    if old[1].is_complex != new[1].is_complex:
        raise Broken(0, f"the first block changes its state from {old[1]} to {new[1]}")
    if old[0] != new[0]:
        words = f"the first block changes the shape of its state from {say_spec(old)} to {say_spec(new)}"
        raise Broken(0, words)
