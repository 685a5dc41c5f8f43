"""A chain's body as a small program over small dense tensors, and its printers."""

from pcr_fx.codegen.cpp import matrix_sums, print_function
from pcr_fx.codegen.ir import Buffer, Function, Unprintable
from pcr_fx.codegen.lower import lower
from pcr_fx.codegen.scalars import Known, Scalar, Scalars
from pcr_fx.codegen.triton import print_assignments, print_scalar

__all__ = [
    "Buffer",
    "Function",
    "Known",
    "Scalar",
    "Scalars",
    "Unprintable",
    "lower",
    "matrix_sums",
    "print_assignments",
    "print_function",
    "print_scalar",
]
