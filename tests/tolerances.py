"""How far results may be from a reference, per dtype: relative to the largest value of the reference."""

import torch
from comparison import relative_error
from torch import Tensor

TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def assert_close(got: Tensor, expected: Tensor) -> None:
    """`got` is as near to `expected` as its dtype asks for. A complex tensor is judged by its parts."""
    got, expected = (torch.view_as_real(t) if t.is_complex() else t for t in (got.detach(), expected.detach()))
    assert torch.isfinite(got).all()
    assert relative_error(got, expected) <= TOLERANCES[got.dtype]
