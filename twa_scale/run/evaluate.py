"""Metrics over a split, summed over batches and ranks."""

from typing import Any

import torch
from torch import nn

from twa_scale.errors import ConfigError
from twa_scale.ranks import Group
from twa_scale.run.batches import Batches
from twa_scale.run.tasks import Metrics, Task


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    batches: Batches,
    group: Group,
    device: torch.device,
    limit: int | None = None,
    every: int = 1,
) -> dict[str, float]:
    """Return the mean of every metric of the task over the examples of all ranks. Collective.

    The mean of a metric is over the examples that it counts. A metric may be missing in some batches or on some ranks.
    The model is in evaluation mode.

    Args:
        task: computes the metrics.
        model: the model; forward passes may be collective.
        batches: the batches of this rank.
        group: all ranks.
        device: the device of the model.
        limit: the largest number of global batches.
        every: evaluate only each `every`-th of these batches.

    Raises:
        ConfigError: a metric counts no example, or is not a sum and a count; on every rank.
    """
    training = model.training
    model.eval()
    totals = Totals(device)
    collect: Any = getattr(task, "collect", None)
    kept: list[Any] = []
    try:
        for batch, counts in batches.in_order(limit, every):
            batch = {key: value.to(device) for key, value in batch.items()}
            metrics, items = collect(model, batch) if collect else (task.metrics(model, batch), [])
            totals.add(metrics, counts)
            kept += items if counts else []
    finally:
        model.train(training)
    means = totals.means(group)
    return means | _summary(task, kept, group) if collect else means


def _summary(task: Any, kept: list[Any], group: Group) -> dict[str, float]:
    """Return the values that a task computes from the items of all ranks."""
    items = [item for of_rank in group.gather(kept) for item in of_rank]
    with group.agree():
        summary: dict[str, float] = task.summarize(items)
    return summary


class Totals:
    """The sums and counts of the metrics of one rank."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._totals: dict[str, torch.Tensor] = {}
        self._wrong = ""

    def add(self, metrics: Metrics, counts: bool) -> None:
        """Add the metrics of a batch; if `counts` is False, only their names."""
        for name, value in metrics.items():
            try:
                total, count = value
                pair = torch.stack([self._scalar(total), self._scalar(count)])
            except (TypeError, ValueError, RuntimeError) as error:
                self._wrong = self._wrong or (
                    f"metric {name!r}: the task returned {value!r}, which is not a sum (a scalar) and a count: {error}."
                )
                continue  # raised in `means`, after all ranks have finished their forward passes
            known = self._totals.setdefault(name, torch.zeros_like(pair))
            if counts:
                known += pair

    def _scalar(self, number: torch.Tensor | float) -> torch.Tensor:
        return torch.as_tensor(number, dtype=torch.float64, device=self._device).reshape(())

    def means(self, group: Group) -> dict[str, float]:
        """Return the mean of every metric over all ranks. Collective.

        The ranks first exchange names, since the order of metrics may differ.

        Raises:
            ConfigError: see `evaluate`.
        """
        with group.agree():
            if self._wrong:
                raise ConfigError(self._wrong)
        names = list(dict.fromkeys(name for known in group.gather(list(self._totals)) for name in known))
        zeros = torch.zeros(2, dtype=torch.float64, device=self._device)
        stacked = torch.stack([self._totals.get(name, zeros) for name in names] or [zeros])
        means = {}
        for name, (total, count) in zip(names, group.sum_(stacked).tolist(), strict=False):
            if count == 0:
                raise ConfigError(
                    f"metric {name!r}: no example of the evaluated batches counts. Evaluate more of them "
                    "(`evaluate_batches`), or leave the metric out."
                )
            means[name] = total / count
        return means
