"""How a run holds its model: one file for each `engine` of the configuration, which says everything about it."""

from twa_scale.run.engines.blocks import blocks_of
from twa_scale.run.engines.choose import pod_mesh, run_engine
from twa_scale.run.engines.run_engine import ELEMENT, RunEngine

__all__ = ["ELEMENT", "RunEngine", "blocks_of", "pod_mesh", "run_engine"]
