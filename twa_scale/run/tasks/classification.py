"""Functions and classes that the classification tasks share: examples in memory, loss and accuracy."""

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
    """Examples in memory. Example i is row i of each tensor."""

    def __init__(self, rows: Batch) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(next(iter(self._rows.values())))

    def __getitem__(self, index: int) -> Batch:
        return {key: rows[index] for key, rows in self._rows.items()}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of logits (B, classes) and int64 labels (B,)."""
    return F.cross_entropy(logits.float(), labels)


def classification_metrics(logits: Tensor, labels: Tensor) -> Metrics:
    """Return the sums over the batch of `loss` (nats) and `accuracy` (correct predictions), and the batch size."""
    loss = F.cross_entropy(logits.float(), labels, reduction="sum")
    correct = (logits.argmax(-1) == labels).sum()
    return {"loss": (loss, len(labels)), "accuracy": (correct, len(labels))}


def integer_labels(labels: Tensor, num_labels: int | None, location: str) -> Tensor:
    """Return labels as int64 after a check of their type and range.

    Args:
        labels: integers, shape (N,).
        num_labels: the number of classes, or None for no upper limit.
        location: the setting or file in error messages.

    Raises:
        ConfigError: the labels are not integers from 0 to num_labels - 1.
    """
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
        raise ConfigError(
            f"{location}: has labels of dtype {labels.dtype} and shape {tuple(labels.shape)}. Give one integer for "
            "each example."
        )
    labels = labels.to(torch.int64)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_labels is not None and high >= num_labels):
        top = "up" if num_labels is None else f"to {num_labels - 1}"
        raise ConfigError(
            f"{location}: label {low if low < 0 else high} is out of range. Labels are integers from 0 {top}."
        )
    return labels


def require_split(split: str, data_of: Mapping[str, T]) -> T:
    """Return the data of `split`.

    Raises:
        ConfigError: the split is unknown, or has no data.
    """
    if split in data_of:
        return data_of[split]
    if split not in SPLITS:
        raise ConfigError(f"split: {split!r} is not one of {', '.join(SPLITS)}{nearest(split, SPLITS) or '.'}")
    raise ConfigError(f"task.{split}: is not set, but the run needs it. Set it, or use {', '.join(data_of)}.")
