"""Measurements of `project`, `combine`, reading and writing, and the estimate of a step of a planned run."""

from twa_scale.tools.bench.bench_tables import bench_json, bench_table
from twa_scale.tools.bench.planned import Work, forecast, planned_work
from twa_scale.tools.bench.stores import parse_stores

__all__ = ["Work", "bench_json", "bench_table", "forecast", "parse_stores", "planned_work"]
