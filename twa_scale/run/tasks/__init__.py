"""Tasks of a run: an object with a model, its data and its loss. Start with `task.py`."""

from twa_scale.run.tasks.build import build_task
from twa_scale.run.tasks.task import SPLITS, Batch, Examples, Metrics, Task, stack

__all__ = ["SPLITS", "Batch", "Examples", "Metrics", "Task", "build_task", "stack"]
