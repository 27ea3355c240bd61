"""Weighted sums of tensors with the type of tensors, which Python's `sum` does not have."""

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor


def weighted(weights: Iterable[float | Tensor], tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of the tensors, each multiplied by its weight."""
    return reduce(torch.add, (weight * tensor for weight, tensor in zip(weights, tensors, strict=True)))


def averaged(weights: Sequence[float] | Tensor, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the weighted sum of each tensor of the state dicts, in float64."""
    return {name: weighted(weights, (state[name].double() for state in states)) for name in states[0]}
