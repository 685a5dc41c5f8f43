"""A chain's body as a small program over small dense tensors, which targets print kernels from."""

from pcr_fx.codegen.ir import Buffer, Function, Unprintable
from pcr_fx.codegen.lower import lower
from pcr_fx.codegen.stages import Stages, split
from pcr_fx.codegen.whole import WHOLE

__all__ = ["WHOLE", "Buffer", "Function", "Stages", "Unprintable", "lower", "split"]
