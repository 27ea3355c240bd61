"""The best average that a run has evaluated: which measure decides, and what is remembered of it."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from twa_scale.average.average import TrainableAverage
from twa_scale.average.state import KeptState
from twa_scale.config import RunConfig
from twa_scale.errors import ConfigError
from twa_scale.run.tasks import Task


class BestAverage:
    """Remembers the coefficients with the lowest `loss` on the held-out split, or by what the task says decides.

    A task has `main_metric` (the name of one of its metrics) and `higher_is_better` when it is not the lowest `loss`.

    Raises:
        ConfigError: a task whose `main_metric` or `higher_is_better` are no name and no truth value.
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

    def restore(self, saved: KeptState | None) -> bool:
        """Go on from a state. Return whether it could be used: values on other data cannot be compared."""
        self.best = saved if saved and saved.data == self.data else None
        return self.best is saved

    def value(self, metrics: Mapping[str, float]) -> float:
        """Return the value that decides.

        Raises:
            ConfigError: the task does not measure its `main_metric`.
        """
        if self.metric not in metrics:
            raise ConfigError(f"task: main_metric is {self.metric!r}; its metrics are {', '.join(sorted(metrics))}.")
        return metrics[self.metric]

    def better(self, one: Mapping[str, float], other: Mapping[str, float]) -> bool:
        """Whether `one` is better than `other`; what is not finite is never better, and worse than all else."""
        left, right = self.value(one), self.value(other)
        if not isfinite(left) or not isfinite(right):
            return isfinite(left) and not isfinite(right)
        return left > right if self.higher else left < right

    def see(self, step: int, metrics: dict[str, float], average: TrainableAverage) -> None:
        """Remember the coefficients of `average`, measured at `step`, when they are the best so far."""
        if not isfinite(self.value(metrics)) or (self.best and not self.better(metrics, self.best.metrics)):
            return
        state: dict[str, Any] = average.state_dict()
        self.best = KeptState(
            step=step,
            data=self.data,
            metrics={name: value for name, value in metrics.items() if isfinite(value)},
            x=state["x"],
            coefficients=state["coefficients"],
            buffers=state["buffers"],
        )
