"""What the classification tasks share: examples in memory, loss and accuracy."""

from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from twa_scale.base.names import nearest
from twa_scale.errors import ConfigError
from twa_scale.run.tasks.task import SPLITS, Batch, Metrics

T = TypeVar("T")


class TensorExamples:
    """Examples that lie in memory as rows of tensors."""

    def __init__(self, rows: Batch) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(next(iter(self._rows.values())))

    def __getitem__(self, index: int) -> Batch:
        return {key: rows[index] for key, rows in self._rows.items()}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits (B, classes) and labels (B,), in nats."""
    return F.cross_entropy(logits.float(), labels)


def classification_metrics(logits: Tensor, labels: Tensor) -> Metrics:
    """Return sums over the batch of `loss` (nats) and `accuracy` (right answers), and its size."""
    loss = F.cross_entropy(logits.float(), labels, reduction="sum")
    right = (logits.argmax(-1) == labels).sum()
    return {"loss": (loss, len(labels)), "accuracy": (right, len(labels))}


def integer_labels(labels: Tensor, num_labels: int | None, where: str) -> Tensor:
    """Return labels as int64 after a look at their range; `num_labels` None stands for no upper limit.

    Raises:
        ConfigError: labels that are not integers from 0 to num_labels - 1.
    """
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
        raise ConfigError(
            f"{where}: labels of type {labels.dtype} and shape {tuple(labels.shape)}. Give one integer each."
        )
    labels = labels.to(torch.int64)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_labels is not None and high >= num_labels):
        top = "up" if num_labels is None else f"to {num_labels - 1}"
        raise ConfigError(
            f"{where}: label {low if low < 0 else high} is out of range. Labels are integers from 0 {top}."
        )
    return labels


def given_split(split: str, given: Mapping[str, T]) -> T:
    """Return where the data of `split` lies.

    Raises:
        ConfigError: no such split, or none that was given.
    """
    if split in given:
        return given[split]
    if split not in SPLITS:
        raise ConfigError(f"split: {split!r} is not one of {', '.join(SPLITS)}{nearest(split, SPLITS) or '.'}")
    raise ConfigError(f"task.{split}: is not set, and the run asks for it. Name its data, or use {', '.join(given)}.")
