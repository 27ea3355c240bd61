"""Weighted sums of tensors, which Python's `sum` does not know to be tensors."""

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor


def weighted(weights: Iterable[float | Tensor], tensors: Iterable[Tensor]) -> Tensor:
    """The sum of the tensors, each multiplied by its weight."""
    return reduce(torch.add, (weight * tensor for weight, tensor in zip(weights, tensors, strict=True)))


def averaged(weights: Sequence[float] | Tensor, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weighted sum of each tensor of the state dicts, in float64."""
    return {name: weighted(weights, (state[name].double() for state in states)) for name in states[0]}
