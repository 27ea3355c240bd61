"""The engines of a run: one file for each value of `engine`, with its build, backward pass, memory and traffic."""

from twa_scale.run.engines.choose import pod_mesh, run_engine
from twa_scale.run.engines.run_engine import ELEMENT, RunEngine, blocks_of

__all__ = ["ELEMENT", "RunEngine", "blocks_of", "pod_mesh", "run_engine"]
