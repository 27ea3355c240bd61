"""The best average that a run has evaluated."""

from collections.abc import Mapping
from math import isfinite
from pathlib import Path

from twa_scale.average.average import TrainableAverage
from twa_scale.average.state import KeptState, RunState
from twa_scale.average.stateful import AverageValues
from twa_scale.config import RunConfig
from twa_scale.errors import ConfigError
from twa_scale.run.tasks import Task


class BestAverage:
    """The coefficients with the best value of the task's main metric on the held-out split.

    The metric is `main_metric` of the task, or `loss`. `higher_is_better` of the task says whether higher values are
    better; by default, they are not.

    Args:
        task: the task of the run.
        config: the configuration of the run.

    Raises:
        ConfigError: `main_metric` is not a string, or `higher_is_better` is not a bool.
    """

    def __init__(self, task: Task, config: RunConfig) -> None:
        self.metric: str = getattr(task, "main_metric", "loss")
        self.higher: bool = getattr(task, "higher_is_better", False)
        if not isinstance(self.metric, str) or not isinstance(self.higher, bool):
            raise ConfigError(
                f"task: main_metric is {self.metric!r} and higher_is_better is {self.higher!r}; give the name of a "
                "metric and a truth value."
            )
        self.data = {"split": config.evaluate_split, "batches": config.evaluate_batches, "metric": self.metric}
        self.best: KeptState | None = None
        """The best average, without the corrections of rows."""
        self.values: AverageValues | None = None
        """The best average, with the corrections of this rank's rows."""

    def restore(self, state: RunState, average: TrainableAverage, directory: Path) -> bool:
        """Restore the best average of a state, and return whether it was evaluated on the same data. Collective.

        Args:
            state: the state of the run.
            average: the average of the run.
            directory: the directory of the state.

        Raises:
            StateError: the file of the corrections of rows cannot be read; on every rank.
        """
        saved = state.kept
        self.best = self.values = None
        if saved and saved.data == self.data:
            self.values = average.values_in_state(saved, state.kept_rows, directory)
            self.best = saved.model_copy(update={"row_values": {}})
        return (saved is None) == (self.best is None)

    def value(self, metrics: Mapping[str, float]) -> float:
        """Return the value of the main metric.

        Raises:
            ConfigError: `metrics` does not have the `main_metric` of the task.
        """
        if self.metric not in metrics:
            raise ConfigError(f"task: main_metric is {self.metric!r}; its metrics are {', '.join(sorted(metrics))}.")
        return metrics[self.metric]

    def better(self, first: Mapping[str, float], second: Mapping[str, float]) -> bool:
        """Return whether `first` is better than `second`. Finite values are better than others."""
        first_value, second_value = self.value(first), self.value(second)
        if not isfinite(first_value) or not isfinite(second_value):
            return isfinite(first_value) and not isfinite(second_value)
        return first_value > second_value if self.higher else first_value < second_value

    def update(
        self, step: int, metrics: dict[str, float], average: TrainableAverage, trial_lr: float | None = None
    ) -> None:
        """Store the coefficients of `average`, evaluated at `step`, if they are the best so far.

        `trial_lr` is the rate of a trial before the first step.
        """
        if not isfinite(self.value(metrics)) or (self.best and not self.better(metrics, self.best.metrics)):
            return
        self.values = average.copy_values()
        self.best = KeptState(
            step=step,
            data=self.data,
            metrics={name: value for name, value in metrics.items() if isfinite(value)},
            x=self.values.x,
            coefficients=self.values.coefficients,
            buffers=self.values.buffers,
            trial_lr=trial_lr,
        )
