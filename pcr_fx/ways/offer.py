"""The ways that there are for a case: who adds one names it here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pcr_fx.solvers import ITERATIVE_SOLVERS
from pcr_fx.targets import TritonKernel
from pcr_fx.ways.case import Case
from pcr_fx.ways.fused import Fused
from pcr_fx.ways.iterative import Iterative
from pcr_fx.ways.native import Native, NativeNewton
from pcr_fx.ways.reduction import Reduction
from pcr_fx.ways.sequential import Sequential
from pcr_fx.ways.way import Backward, Forward, Refused


def forward_ways(case: Case) -> Iterator[Forward | Refused]:
    """Every way forward, block by block first, and by name why others are none."""
    yield from _block_by_block(case, "forward")
    yield Sequential()
    for solver in ITERATIVE_SOLVERS:
        yield by_iteration(case, solver)


def backward_ways(case: Case) -> Iterator[Backward | Refused]:
    """Likewise backward."""
    yield from _block_by_block(case, "backward")
    yield Sequential()
    yield by_reduction(case)


def _block_by_block(case: Case, direction: str) -> Iterable[Native | Fused | Refused]:
    way = block_by_block(case)
    return way.alternatives(case, direction) if isinstance(way, Native) else (way,)


def block_by_block(case: Case) -> Native | Fused | Refused:
    """Block by block in the chain's kernel, both ways."""
    return Fused.of(case, "sequential") if isinstance(case.kernel, TritonKernel) else Native.of(case)


def by_iteration(case: Case, solver: str) -> Forward | Refused:
    """An iterative solver forward: in the chain's kernel if it can be, else in PyTorch's ops."""
    in_kernel = (Fused.of(case, solver), NativeNewton.of(case)) if solver == "newton" else ()
    return next((way for way in in_kernel if not isinstance(way, Refused)), None) or Iterative.of(case, solver)


def by_reduction(case: Case) -> Backward | Refused:
    """The adjoint by transposed reductions, likewise."""
    fused = Fused.of(case, "newton")
    return Reduction.of(case) if isinstance(fused, Refused) else fused


def candidates(case: Case, direction: str) -> tuple[list[Forward | Backward], list[Refused]]:
    """The ways that are worth timing, and why others are not."""
    ways: list[Forward | Backward] = []
    refused = []
    for way in forward_ways(case) if direction == "forward" else backward_ways(case):
        if isinstance(way, Refused):
            refused.append(way)
        elif reason := way.hopeless(case, direction):
            refused.append(Refused(way.name, reason))
        else:
            ways.append(way)
    return ways, refused


def fallback(case: Case) -> Native | Sequential:
    """What goes block by block where an iteration failed: native code, if that pays."""
    native = Native.of(case)
    return Sequential() if isinstance(native, Refused) or native.why_not_paying(case) else native
