"""Tasks of `twa-scale run`. A task is an object with a model, its data and its loss."""

from twa_scale.run.tasks.build import build_task
from twa_scale.run.tasks.task import SPLITS, Batch, Examples, Metrics, Task, stack

__all__ = ["SPLITS", "Batch", "Examples", "Metrics", "Task", "build_task", "stack"]
