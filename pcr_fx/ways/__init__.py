"""Every way to run a chain, a file each, behind one protocol: `Forward` and `Backward`."""

from pcr_fx.ways.case import Case
from pcr_fx.ways.eager import EAGER, evaluate, evaluate_whole
from pcr_fx.ways.fused import Fused
from pcr_fx.ways.iterative import Iterative
from pcr_fx.ways.memory import in_units
from pcr_fx.ways.native import Native
from pcr_fx.ways.offer import block_by_block, by_iteration, by_reduction, candidates, fallback
from pcr_fx.ways.reduction import Reduction
from pcr_fx.ways.sequential import Sequential
from pcr_fx.ways.way import IN_SEQUENCE, Backward, Forward, Refused, Solution, Way

__all__ = [
    "EAGER",
    "IN_SEQUENCE",
    "Backward",
    "Case",
    "Forward",
    "Fused",
    "Iterative",
    "Native",
    "Reduction",
    "Refused",
    "Sequential",
    "Solution",
    "Way",
    "block_by_block",
    "by_iteration",
    "by_reduction",
    "candidates",
    "evaluate",
    "evaluate_whole",
    "fallback",
    "in_units",
]
