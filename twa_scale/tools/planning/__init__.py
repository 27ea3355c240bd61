"""Estimates of the memory and traffic of a run before it starts. Start with `plan.py`."""

from twa_scale.tools.planning.choices import choose_store
from twa_scale.tools.planning.plan import Plan, make_plan
from twa_scale.tools.planning.plan_tables import plan_json, plan_tables

__all__ = ["Plan", "choose_store", "make_plan", "plan_json", "plan_tables"]
