"""Further validations in Lightning's Trainer, with other names of metrics."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch

try:
    from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
    from lightning.pytorch.utilities.seed import isolate_rng
except ImportError:  # the same classes in separate packages
    from pytorch_lightning.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
    from pytorch_lightning.utilities.seed import isolate_rng

_COMMON_METRICS = {"step", "epoch"}


class _Prefixed(_LoggerConnector):  # type: ignore[misc]
    """Passes the metrics of a validation to loggers with a prefix, separately from those of the Trainer."""

    def __init__(self, trainer: Any, prefix: str) -> None:
        super().__init__(trainer)
        self._prefix = prefix

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        super().log_metrics(self.named(metrics), step)

    def named(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        return {name if name in _COMMON_METRICS else f"{self._prefix}_{name}": value for name, value in metrics.items()}


def validate_once_more(
    trainer: Any, callback: Any, validate: Callable[[], Any], prefix: str
) -> dict[str, torch.Tensor]:
    """Run the validation of `fit` again, and return its metrics as `PREFIX_NAME`, which are also logged. Collective.

    Only `callback` is called, so that no other callback saves a checkpoint or stops the training. The random states and
    the Trainer's own metrics are restored.
    """
    connector = _Prefixed(trainer, prefix)
    with _as_before(trainer), isolate_rng(include_cuda=torch.cuda.is_available()):
        trainer.callbacks, trainer._logger_connector = [callback], connector
        trainer.validating = True
        validate()
        return connector.named(dict(connector.callback_metrics))


@contextmanager
def _as_before(trainer: Any) -> Iterator[None]:
    """Restore the state of the Trainer that a validation changes."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    saved = trainer.callbacks, trainer._logger_connector, trainer.state.stage, loop.verbose
    restarting, progress = loop.restarting, deepcopy(loop.batch_progress.state_dict())
    loop.restarting, loop.verbose = False, False  # a resumed loop would continue at its end
    try:
        yield
    finally:
        trainer.callbacks, trainer._logger_connector, trainer.state.stage, loop.verbose = saved
        loop.batch_progress.load_state_dict(progress)
        loop.restarting = restarting
