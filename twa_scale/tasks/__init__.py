"""What `twa-scale run` trains on: a model, its data and its loss, as one object."""

from twa_scale.tasks.build import build_task
from twa_scale.tasks.protocol import SPLITS, Batch, Examples, Metrics, Task, stack

__all__ = ["SPLITS", "Batch", "Examples", "Metrics", "Task", "build_task", "stack"]
