"""Triton from assignments of scalars, each of which becomes a tensor, and how every printed module begins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from pcr_fx.targets.triton.assignments import Assignment, Scalar, number

REALS = {torch.float32: "tl.float32", torch.float64: "tl.float64"}
HEADER = """
import triton
import triton.language as tl

from pcr_fx.targets.triton.functions import *  # noqa: F403
"""
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
# Truth values are 0 and 1, as everywhere in the language of kernels.
_WRITTEN = {
    "neg": "-{0}",
    "abs": "tl.abs({0})",
    "square": "{0} * {0}",
    "cube": "{0} * {0} * {0}",
    "reciprocal": "1 / {0}",
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "log2": "tl.log2({0})",
    "sin": "tl.sin({0})",
    "cos": "tl.cos({0})",
    "erf": "tl.erf({0})",
    "floor": "tl.floor({0})",
    "ceil": "tl.ceil({0})",
    "sigmoid": "1 / (1 + tl.exp(-{0}))",
    "relu": "tl.where({0} < 0, {zero}, {0})",  # NaN stays NaN
    "sign": "tl.where({0} > 0, {one}, tl.where({0} < 0, -{one}, {zero}))",
    "where": "tl.where({0} != 0, {1}, {2})",
    "maximum": "tl.maximum({0}, {1}, tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({0}, {1}, tl.PropagateNan.ALL)",
    "logical_and": "tl.where(({0} != 0) & ({1} != 0), {one}, {zero})",
    "logical_or": "tl.where(({0} != 0) | ({1} != 0), {one}, {zero})",
    "logical_not": "tl.where({0} == 0, {one}, {zero})",
    **{name: f"tl.where({{0}} {sign} {{1}}, {{one}}, {{zero}})" for name, sign in _COMPARED.items()},
}


def print_assignments(assignments: Iterable[Assignment], dtype: str) -> list[str]:
    """A line for each. Functions that Triton has no operator for are called by name, from what `HEADER` imports."""
    return [f"{one.name} = {_call(one.function, one.arguments, dtype)}" for one in assignments]


def print_scalar(scalar: Scalar, dtype: str) -> str:
    """A name, or a number of `dtype`, such as `tl.float32`: Triton takes a bare one for float32."""
    if isinstance(scalar, str):
        return scalar
    value = number(scalar)
    text = repr(value) if math.isfinite(value) else f'float("{value}")'
    return f"tl.full((), {text}, {dtype})"


def _call(function: str, arguments: Sequence[Scalar], dtype: str) -> str:
    printed = [print_scalar(argument, dtype) for argument in arguments]
    if function in _INFIX:
        return f"{printed[0]} {_INFIX[function]} {printed[1]}"
    if function in _WRITTEN:
        known = {"zero": print_scalar(0.0, dtype), "one": print_scalar(1.0, dtype)}
        return _WRITTEN[function].format(*printed, **known)
    return f"{function}({', '.join(printed)})"
