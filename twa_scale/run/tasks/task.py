"""What a task has to offer."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
"""Named tensors: of one example, or of many, stacked along a new first dimension."""

Metrics = dict[str, tuple[Tensor, int]]
"""By name: the sum over the examples (or tokens) of a batch, and their number. Both add up over batches."""

SPLITS = ("train", "validation", "test")


class Examples(Protocol):
    """Examples of one split, read when asked for. The order is fixed: shuffling is the loop's business."""

    def __len__(self) -> int:
        """Return the number of examples, at least 1."""

    def __getitem__(self, index: int) -> Batch:
        """Return one example as CPU tensors, whose shapes are those of every other example."""


@runtime_checkable
class Task(Protocol):
    """Model, data and loss.

    Left out on purpose: an optimizer, because only the coefficients are trained; devices, because the loop
    moves the model and the batches; ranks, because the loop deals the examples out. So a task that works
    alone works on any number of ranks. `loss` and `metrics` get the model as an argument: the loop may have
    wrapped it.

    Two attributes are optional. `main_metric` is the name of the metric by which a run keeps the best of its
    evaluations, "loss" when a task does not have it; `higher_is_better` says that its highest value is the best, and
    not its lowest.
    """

    def model(self) -> nn.Module:
        """Return the architecture, in float32.

        The candidates fill its parameters and persistent buffers. Buffers that a state dict does not hold
        keep the values that they have here, and so does the base model of an adapter (a PeftModel).
        """

    def dataset(self, split: str) -> Examples:
        """Return the examples of `train`, `validation` or `test`.

        Raises:
            ConfigError: a split that has no data.
        """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss over the batch, a scalar to call backward on."""

    def metrics(self, model: nn.Module, batch: Batch) -> Metrics:
        """Return sums and counts by name; `loss` is always among them, its mean is what `loss` returns."""


def stack(examples: Sequence[Batch]) -> Batch:
    """Return one batch of a sequence of examples."""
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}
