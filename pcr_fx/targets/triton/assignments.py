"""Assignments of scalars: what a body is written out to, and what Triton is printed from."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Known(enum.Enum):
    """A number that is known from what it stands for: the derivative of one variable by another, or by itself.

    Zero times anything is zero, and vanishes from what is written out. A zero that a model computed does not, since its
    product with an infinity is NaN.
    """

    ZERO = 0.0
    ONE = 1.0


# The name of a number, a constant, or what is known.
Scalar = str | float | Known


@dataclass(frozen=True)
class Assignment:
    """`name = function(*arguments)`."""

    name: str
    function: str
    arguments: tuple[Scalar, ...]


def number(scalar: Scalar) -> float:
    """The value of a scalar that has no name."""
    assert not isinstance(scalar, str), scalar
    return scalar.value if isinstance(scalar, Known) else scalar
