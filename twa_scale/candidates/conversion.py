"""The conversion of stored tensors to those of a model: their names and the segments they consist of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, runtime_checkable

import torch

from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.segments import Place, Segment, Segments

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Made:
    """A tensor of the model that is no stored tensor, but made of segments of some."""

    shape: Shape
    segments: Segments
    """Their tensors there are called as in the files."""
    stored: Mapping[str, Shape]
    """The shape of each tensor that segments are of."""


@dataclass(frozen=True, eq=False)
class Conversion:
    """What the model's tensors are in files."""

    names: Mapping[str, str]
    """The names in the files of tensors that are stored as they are, by the model's names."""
    made: Mapping[str, Made]
    """The other tensors."""

    def stored(self) -> set[str]:
        """Return the names of all tensors in files that are used."""
        return set(self.names.values()) | {name for one in self.made.values() for name in one.stored}

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain values and tensors."""
        return {"names": dict(self.names), "made": {name: _state_of(one) for name, one in self.made.items()}}


def _state_of(made: Made) -> dict[str, Any]:
    index = {name: i for i, name in enumerate(made.stored)}
    parts = [
        (index[one.there.name], one.here.first, one.there.first, *one.sizes, *one.there.strides)
        for one in made.segments
    ]
    numbers = torch.tensor(parts, dtype=torch.int64).reshape(len(parts), 3 + 2 * len(made.shape))
    return {"shape": made.shape, "stored": dict(made.stored), "segments": numbers}


def made_of_state(name: str, shape: Shape, stored: Mapping[str, Shape], segments: torch.Tensor) -> Made:
    """Return what a state holds of the tensor `name`: rows of `segments` are those that `Conversion.state_dict` has."""
    names, strides = list(stored), row_major(shape)
    parts = [
        Segment(
            tuple(row[3 : 3 + len(shape)]),
            Place(name, row[1], strides),
            Place(names[row[0]], row[2], tuple(row[3 + len(shape) :])),
        )
        for row in segments.tolist()
    ]
    return Made(shape, Segments(parts), stored)


def row_major(shape: Shape) -> Shape:
    """Return the strides of a tensor whose elements follow each other."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


@runtime_checkable
class Converting(Protocol):
    """What a candidate may offer that shows other tensors than its files hold."""

    def made(self, name: str) -> Made | None:
        """Return of what a tensor is made; None where it is stored as it is."""

    def conversion(self) -> Conversion | None:
        """Return what all its tensors are in files; None where nothing is converted."""


def made(candidate: Candidate, name: str) -> Made | None:
    """Return of what a tensor is made; None where it is stored as it is, under whatever name."""
    return candidate.made(name) if isinstance(candidate, Converting) else None


def conversion(candidate: Candidate) -> Conversion | None:
    """Return what the tensors of a candidate are in files; None where nothing is converted."""
    return candidate.conversion() if isinstance(candidate, Converting) else None


def conversions(candidates: Sequence[Candidate]) -> list[Conversion]:
    """Return the conversions of candidates, each once."""
    found = [conversion(candidate) for candidate in candidates]
    return list(dict.fromkeys(one for one in found if one is not None))
