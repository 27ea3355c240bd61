"""Estimates of the memory and traffic of a run before it starts. Start with `plan.py`."""

from twa_scale.tools.planning.averages import averages_bytes
from twa_scale.tools.planning.choices import choose_store
from twa_scale.tools.planning.plan import Plan, make_plan
from twa_scale.tools.planning.plan_tables import averages_table, plan_json, plan_tables

__all__ = ["Plan", "averages_bytes", "averages_table", "choose_store", "make_plan", "plan_json", "plan_tables"]
