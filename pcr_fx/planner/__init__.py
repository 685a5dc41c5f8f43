"""What to run: which way through a chain, forward and backward, by measurement or by rule."""

from pcr_fx.planner.cache import cached_plans, clear_plans
from pcr_fx.planner.choice import ADAM, BESIDE, FUSED_ADAM, HANDING, Choice, Timing
from pcr_fx.planner.plan import Plan, make_plan, plan_by_key
from pcr_fx.planner.watch import Watch

__all__ = [
    "ADAM",
    "BESIDE",
    "FUSED_ADAM",
    "HANDING",
    "Choice",
    "Plan",
    "Timing",
    "Watch",
    "cached_plans",
    "clear_plans",
    "make_plan",
    "plan_by_key",
]
