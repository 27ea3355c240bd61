"""The names of metrics that trainers such as those of TRL add when they log."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_COMMON_METRICS = {"epoch", "num_input_tokens_seen"}


@contextmanager
def added_metrics_as(trainer: Any, prefix: str) -> Iterator[None]:
    """Rename the metrics that the class of the trainer adds to `PREFIX_NAME`, in a `with` block.

    Trainers of TRL add metrics in `log`, with the same names for every prefix of an evaluation, so that the metrics of
    one average would replace those of another.

    Args:
        trainer: a Trainer of transformers.
        prefix: replaces the prefix "eval".
    """
    log, on_log = trainer.log, trainer.callback_handler.on_log
    names: set[str] = set()

    def remember(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        names.update(logs)
        log(logs, *args, **kwargs)
        names.clear()

    def rename(args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> Any:
        for name in logs.keys() - names - _COMMON_METRICS:
            for entry in (logs, state.log_history[-1]):
                entry[f"{prefix}_{name.removeprefix('eval_')}"] = entry.pop(name)
        return on_log(args, state, control, logs, **kwargs)

    trainer.log, trainer.callback_handler.on_log = remember, rename
    try:
        yield
    finally:
        trainer.log, trainer.callback_handler.on_log = log, on_log
