"""From the `task` section of a configuration to a Task."""

from twa_scale.base.names import nearest
from twa_scale.config import TaskConfig, validated
from twa_scale.errors import ConfigError
from twa_scale.run.tasks.causal_lm import CausalLM, CausalLMOptions
from twa_scale.run.tasks.image_classification import ImageClassification, ImageClassificationOptions
from twa_scale.run.tasks.import_path import call, import_function
from twa_scale.run.tasks.sequence_classification import SequenceClassification, SequenceClassificationOptions
from twa_scale.run.tasks.task import Task

SHIPPED = ("causal_lm", "image_classification", "sequence_classification")


def build_task(config: TaskConfig) -> Task:
    """Return the task that `config.name` names, made with the further keys of the section.

    Raises:
        ConfigError: an unknown name, options that do not fit, data that cannot be used, or a function that
            does not return a Task.
    """
    match config.name:
        case "causal_lm":
            return CausalLM(validated(CausalLMOptions, config.options, "task"))
        case "image_classification":
            return ImageClassification(validated(ImageClassificationOptions, config.options, "task"))
        case "sequence_classification":
            return SequenceClassification(validated(SequenceClassificationOptions, config.options, "task"))
        case path if ":" in path:
            return _own_task(path, config)
        case name:
            raise ConfigError(
                f"task.name: {name!r} is unknown{nearest(name, SHIPPED) or '.'} Use {', '.join(SHIPPED)}, or your own "
                "by package.module:function."
            )


def _own_task(path: str, config: TaskConfig) -> Task:
    task = call(import_function(path, "task.name"), config.options, "task", path)
    if isinstance(task, Task):
        return task
    missing = [name for name in ("model", "dataset", "loss", "metrics") if not hasattr(task, name)]
    raise ConfigError(
        f"task.name: {path!r} returned {type(task).__name__}, which lacks {', '.join(missing)} of a Task."
    )
