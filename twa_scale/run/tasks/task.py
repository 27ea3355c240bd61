"""The interface of a task."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
"""Tensors by name: of one example, or of several stacked along a new first dimension."""

Metrics = dict[str, tuple[Tensor, int]]
"""For each metric, the sum over the examples (or tokens) of a batch, and their number."""

SPLITS = ("train", "validation", "test")


class Examples(Protocol):
    """The examples of one split, read on access and in a fixed order. The training loop shuffles them.

    Three attributes are optional. `chunk_sizes` are the lengths of chunks of consecutive examples that are best read
    together, such as those of a compressed block. The loop then shuffles the chunks, and the examples in each chunk.
    `without_repeats` has the same examples without repetitions. Evaluations use it. `token_counts` are the numbers of
    tokens of the examples. Evaluations then put examples of similar length into a batch, so that a task which drops
    the padding of a batch computes less.
    """

    def __len__(self) -> int:
        """Return the number of examples, at least 1."""

    def __getitem__(self, index: int) -> Batch:
        """Return one example as CPU tensors. All examples have the same shapes."""


@runtime_checkable
class Task(Protocol):
    """The model, data and loss of a run.

    A task has no optimizer, because only the coefficients are trained. It does not depend on devices or ranks, because
    the training loop moves the model and the batches and distributes the examples. A task that works in one process
    therefore works on any number of ranks. `loss` and `metrics` receive the model as an argument, because the loop may
    have wrapped it.

    Five attributes are optional. `main_metric` (default: "loss") is the name of the metric that selects the best
    evaluation of a run. `higher_is_better` (default: False) tells whether its highest value is the best. The method
    `terms(batch)` returns the number of terms of which `loss` is the mean, such as predicted tokens, so that batches
    with more terms count more. Without it, if it is None, or if it returns None for a part of a global batch, all
    examples count equally.

    The methods `collect(model, batch)` and `summarize(items)` compute values that are not means, such as an average
    precision. `collect` returns the metrics and a list of items; `summarize` gets the items of all batches and ranks,
    in any order, and returns further values by name.
    """

    def model(self) -> nn.Module:
        """Return the model in float32.

        The candidates overwrite its parameters and persistent buffers. Other buffers keep their values,
        and so does the base model of an adapter (a PeftModel).
        """

    def dataset(self, split: str) -> Examples:
        """Return the examples of `train`, `validation` or `test`.

        Raises:
            ConfigError: the split has no data.
        """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss over the batch, as a scalar with a gradient."""

    def metrics(self, model: nn.Module, batch: Batch) -> Metrics:
        """Return sums and counts by name. The metric `loss` is required; its mean is the value of `loss()`."""


def stack(examples: Sequence[Batch]) -> Batch:
    """Return a batch of several examples, stacked along a new first dimension."""
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}
