"""What projecting, combining, reading and writing cost on this machine; and by that a step of a planned run."""

from twa_scale.bench.planned import Work, forecast, planned_work
from twa_scale.bench.tables import bench_json, bench_table

__all__ = ["Work", "bench_json", "bench_table", "forecast", "planned_work"]
