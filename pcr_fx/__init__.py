"""Deep PyTorch models, their chains of repeated blocks evaluated in parallel.

`torch.compile(model, backend="deeppcr")` compiles an unchanged model; `transform` is the explicit way; `report` and
`explain` say what was done, and why the rest was not; `solve_chain` is the solver itself.
"""

from pcr_fx.backend import register
from pcr_fx.errors import (
    BodyError,
    CaptureError,
    OptionError,
    PcrFxError,
    PlanError,
    SolveError,
    TextError,
    UnsupportedError,
)
from pcr_fx.explicit import TransformedModule, transform
from pcr_fx.introspect import explain, report
from pcr_fx.options import Options
from pcr_fx.planner import cached_plans, clear_plans
from pcr_fx.reports import RewriteReport
from pcr_fx.scan import scan
from pcr_fx.solve import ChainSolution, solve_chain
from pcr_fx.solvers import Outcome, SolveStats
from pcr_fx.verification import Verification, verify

__all__ = [
    "BodyError",
    "CaptureError",
    "ChainSolution",
    "OptionError",
    "Options",
    "Outcome",
    "PcrFxError",
    "PlanError",
    "RewriteReport",
    "SolveError",
    "SolveStats",
    "TextError",
    "TransformedModule",
    "UnsupportedError",
    "Verification",
    "cached_plans",
    "clear_plans",
    "explain",
    "report",
    "scan",
    "solve_chain",
    "transform",
    "verify",
]

register()
