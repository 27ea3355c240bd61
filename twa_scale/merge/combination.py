"""The weights with which a merge combines tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from twa_scale.candidates.buffers import Source

Weights = Callable[[str], Source]
"""A function of a tensor name: the weights a_1..a_n of the candidates, or the index of the candidate to copy."""
RowWeights = Mapping[str, Callable[[], torch.Tensor]]
"""For tensors with weights for each row, a function that returns them: (n, rows), float64, with sum 1."""
PartWeights = Mapping[str, Sequence[Sequence[float]]]
"""For tensors with weights for equal parts along the first dimension, the weights a_1..a_n of each part."""


@dataclass(frozen=True)
class Combination:
    """The weights and values from which the tensors of the result are computed."""

    weights: Weights
    """The weights of each tensor."""
    row_weights: RowWeights = field(default_factory=dict)
    """The weights of each row, for tensors that have them. They replace `weights`."""
    part_weights: PartWeights = field(default_factory=dict)
    """The weights of each part of tensors that stack experts. They replace `weights`."""
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Values that replace tensors of the candidates, equal on every rank."""
    units: Mapping[str, str] = field(default_factory=dict)
    """For some tensors, the name of a unit. One rank computes and writes all tensors of a unit."""
