"""A chain's body as a small program over small dense tensors, which targets print kernels from."""

from pcr_fx.codegen.ir import Buffer, Function, Unprintable
from pcr_fx.codegen.lower import lower

__all__ = ["Buffer", "Function", "Unprintable", "lower"]
