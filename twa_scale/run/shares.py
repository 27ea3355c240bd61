"""The part of each micro-batch in the mean loss of a global batch."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from twa_scale.ranks import Group
from twa_scale.run.tasks import Batch, Task


def with_divisors(
    batches: Iterable[Batch], task: Task, num_micro: int, group: Group, device: torch.device
) -> Iterator[tuple[Batch, float]]:
    """Yield the micro-batches of this rank, each with the divisor of its mean loss. Collective.

    The sum of the divided losses, averaged over the ranks, is the mean over all terms of the global batch, so it does
    not depend on the number of ranks and micro-batches. The ranks exchange their numbers of terms only if the task has
    a method `terms`. If it returns None for a micro-batch of any rank, all micro-batches of that global batch count
    equally.

    Args:
        batches: the micro-batches of this rank, on any device.
        task: computes the loss.
        num_micro: the number of micro-batches.
        group: all ranks.
        device: the device of the model.
    """
    terms_of: Any = getattr(task, "terms", None)
    if terms_of is None:
        yield from ((batch, num_micro) for batch in batches)
        return
    all_batches = list(batches)
    terms = [terms_of(batch) for batch in all_batches]
    known = [number for number in terms if number is not None]
    counted = torch.tensor([sum(known), len(terms) - len(known)], dtype=torch.float64, device=device)
    total, num_unknown = group.sum_(counted).tolist()
    for batch, count in zip(all_batches, terms, strict=True):
        if num_unknown:
            yield batch, num_micro
        else:
            yield batch, max(total, 1.0) / (count * group.size) if count else math.inf
