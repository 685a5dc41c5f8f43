"""A chain's body as a small program over small dense tensors, and its printers."""

from pcr_fx.codegen.cpp import print_function
from pcr_fx.codegen.ir import Buffer, Function, Unprintable
from pcr_fx.codegen.lower import lower

__all__ = ["Buffer", "Function", "Unprintable", "lower", "print_function"]
