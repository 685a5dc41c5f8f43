"""What to run: which solver, forward and backward, for a chain of known sizes."""

from pcr_fx.planner.plan import Plan, make_plan, plan_by_key
from pcr_fx.planner.rule import Choice, choose

__all__ = ["Choice", "Plan", "choose", "make_plan", "plan_by_key"]
