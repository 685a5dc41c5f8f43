"""What the environment switches off."""

from __future__ import annotations

import os

import torch

OFF = "PCR_FX_DISABLE=1 switches pcr_fx off: models and loops run as they were written"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_disabled() -> bool:
    """Whether everything is switched off: `PCR_FX_DISABLE=1`.

    Looked at where a model is read or compiled, and by each call of `solve_chain`, `scan` and an operator in an exported program.
    """
    return os.environ.get("PCR_FX_DISABLE") == "1"
