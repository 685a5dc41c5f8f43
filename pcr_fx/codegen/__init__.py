"""A chain's body as a small program over small dense tensors, which targets print kernels from."""

from pcr_fx.codegen.ir import Buffer, Function, Unprintable
from pcr_fx.codegen.lower import lower
from pcr_fx.codegen.whole import SMALL

__all__ = ["SMALL", "Buffer", "Function", "Unprintable", "lower"]
