"""What candidates say of tensors that are made of stored ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.segments import Segments


@dataclass(frozen=True)
class Made:
    """A tensor that is no stored tensor, but made of segments of some."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    segments: Segments
    stored: Mapping[str, tuple[str, tuple[int, ...]]]
    """The name in the files and the shape of each tensor that segments are of, by the name that they have for it."""


@runtime_checkable
class Making(Protocol):
    """What a candidate may offer that makes tensors of stored ones."""

    def made(self, name: str) -> Made | None:
        """Return of what a tensor is made; None where it is stored as it is."""


def made(candidate: Candidate, name: str) -> Made | None:
    """Return of what a tensor is made; None where it is stored as it is, under whatever name."""
    return candidate.made(name) if isinstance(candidate, Making) else None
