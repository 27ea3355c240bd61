"""The weights with which a merge combines tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from twa_scale.candidates.buffers import Source

Weights = Callable[[str], Source]
"""A function of a tensor name: the weights a_1..a_n of the candidates, or the index of the candidate to copy."""
RowWeights = Mapping[str, Callable[[], torch.Tensor]]
"""For tensors whose rows have weights of their own, a function that returns them: (n, rows), float64, of sum 1."""
PartWeights = Mapping[str, Sequence[Sequence[float]]]
"""For tensors whose equal parts along the first dimension have weights of their own, the weights a_1..a_n of each."""


@dataclass(frozen=True)
class Combination:
    """What each tensor of the result is computed from."""

    weights: Weights
    """The weights of each tensor."""
    row_weights: RowWeights = field(default_factory=dict)
    """The weights of each row, for tensors that have them. They replace `weights`."""
    part_weights: PartWeights = field(default_factory=dict)
    """The weights of each part of tensors that stack experts. They replace `weights`."""
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Values to write instead of tensors of the candidates; the same on every rank."""
    units: Mapping[str, str] = field(default_factory=dict)
    """For some tensors, the name of a unit. One rank computes and writes all tensors of a unit."""
