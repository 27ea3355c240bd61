"""Construction of a task from the `task` section of a configuration."""

from collections.abc import Callable
from typing import Any

from twa_scale.base.names import nearest
from twa_scale.config import Section, TaskConfig, validated
from twa_scale.errors import ConfigError
from twa_scale.run.tasks.causal_lm import CausalLM, CausalLMOptions
from twa_scale.run.tasks.image_classification import ImageClassification, ImageClassificationOptions
from twa_scale.run.tasks.import_path import call, import_function
from twa_scale.run.tasks.object_detection import ObjectDetection, ObjectDetectionOptions
from twa_scale.run.tasks.sequence_classification import SequenceClassification, SequenceClassificationOptions
from twa_scale.run.tasks.task import Task

SHIPPED: dict[str, tuple[Callable[[Any], Task], type[Section]]] = {
    "causal_lm": (CausalLM, CausalLMOptions),
    "image_classification": (ImageClassification, ImageClassificationOptions),
    "object_detection": (ObjectDetection, ObjectDetectionOptions),
    "sequence_classification": (SequenceClassification, SequenceClassificationOptions),
}
"""The class and the options of each task, by name."""


def build_task(config: TaskConfig) -> Task:
    """Return the task `config.name`, constructed with the other keys of the section.

    Raises:
        ConfigError: the name is unknown, the options or the data are not valid, or a custom function does not return
            a Task.
    """
    if config.name in SHIPPED:
        task, options = SHIPPED[config.name]
        return task(validated(options, config.options, "task"))
    if ":" in config.name:
        return _own_task(config.name, config)
    raise ConfigError(
        f"task.name: {config.name!r} is unknown{nearest(config.name, SHIPPED) or '.'} Use {', '.join(SHIPPED)}, or "
        "package.module:function of your own task."
    )


def _own_task(path: str, config: TaskConfig) -> Task:
    task = call(import_function(path, "task.name"), config.options, "task", path)
    if isinstance(task, Task):
        return task
    missing = [name for name in ("model", "dataset", "loss", "metrics") if not hasattr(task, name)]
    raise ConfigError(
        f"task.name: {path!r} returned {type(task).__name__}, which lacks {', '.join(missing)} of a Task."
    )
