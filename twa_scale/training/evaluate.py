"""Metrics over a split, summed over batches and ranks."""

import torch
from torch import nn

from twa_scale.ranks import Group
from twa_scale.tasks import Task
from twa_scale.training.batches import Batches


@torch.no_grad()
def evaluate(
    task: Task, model: nn.Module, batches: Batches, group: Group, device: torch.device, limit: int | None = None
) -> dict[str, float]:
    """Return the mean of every metric of the task over the examples of all ranks. Collective.

    The model is in evaluation mode meanwhile. `limit` bounds the number of batches of a rank.
    """
    training = model.training
    model.eval()
    totals: dict[str, torch.Tensor] = {}
    try:
        for batch, counts in batches.in_order(limit):
            values = task.metrics(model, {key: value.to(device) for key, value in batch.items()})
            for name, (total, count) in values.items():
                pair = torch.stack([total.double(), torch.tensor(float(count), device=device, dtype=torch.float64)])
                totals.setdefault(name, torch.zeros_like(pair)).add_(pair * counts)
    finally:
        model.train(training)
    return {name: float(pair[0] / pair[1]) for name, pair in ((n, group.sum_(t)) for n, t in totals.items())}
