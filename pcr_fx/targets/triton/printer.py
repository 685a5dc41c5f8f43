"""Triton from assignments of scalars, each of which becomes a tensor, and how every printed module begins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from pcr_fx.codegen.functions import FUNCTIONS
from pcr_fx.targets.triton.assignments import Assignment, Scalar, number

REALS = {torch.float32: "tl.float32", torch.float64: "tl.float64"}
HEADER = """
import triton
import triton.language as tl

from pcr_fx.targets.triton.functions import *  # noqa: F403
"""


def print_assignments(assignments: Iterable[Assignment], dtype: str) -> list[str]:
    """A line for each. Functions that Triton has no operator for are called by name, from what `HEADER` imports."""
    return [f"{one.name} = {_call(one.function, one.arguments, dtype)}" for one in assignments]


def print_scalar(scalar: Scalar, dtype: str) -> str:
    """A name, or a number of `dtype`, such as `tl.float32`: Triton takes a bare one for float32."""
    if isinstance(scalar, str):
        return scalar
    return f"tl.full((), {print_number(number(scalar))}, {dtype})"


def print_number(value: float) -> str:
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def _call(function: str, arguments: Sequence[Scalar], dtype: str) -> str:
    printed = [print_scalar(argument, dtype) for argument in arguments]
    zero, one = print_scalar(0.0, dtype), print_scalar(1.0, dtype)
    return FUNCTIONS[function].triton.format(*printed, zero=zero, one=one)
