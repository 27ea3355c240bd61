"""The conversion of stored tensors to those of a model: their names and the segments they consist of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, runtime_checkable

import torch

from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.segments import Position, Segment, Segments

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Made:
    """A tensor of the model that consists of segments of stored tensors."""

    shape: Shape
    segments: Segments
    """The segments, with the names of tensors in the files."""
    stored: Mapping[str, Shape]
    """The shapes of the stored tensors, by name."""


@dataclass(frozen=True, eq=False)
class Conversion:
    """The mapping from the tensors of a model to stored tensors."""

    names: Mapping[str, str]
    """The stored names of tensors that are stored unchanged, by their names in the model."""
    made: Mapping[str, Made]
    """The other tensors, which are made of segments, by their names in the model."""

    def stored(self) -> set[str]:
        """Return the names of all stored tensors that are used."""
        return set(self.names.values()) | {name for one in self.made.values() for name in one.stored}

    def state_dict(self) -> dict[str, Any]:
        """Return the conversion as plain values and tensors."""
        return {"names": dict(self.names), "made": {name: _state_of(one) for name, one in self.made.items()}}


def _state_of(made: Made) -> dict[str, Any]:
    index = {name: i for i, name in enumerate(made.stored)}
    parts = [
        (index[one.source.name], one.target.first, one.source.first, *one.sizes, *one.source.strides)
        for one in made.segments
    ]
    numbers = torch.tensor(parts, dtype=torch.int64).reshape(len(parts), 3 + 2 * len(made.shape))
    return {"shape": made.shape, "stored": dict(made.stored), "segments": numbers}


def made_of_state(name: str, shape: Shape, stored: Mapping[str, Shape], segments: torch.Tensor) -> Made:
    """Return the `Made` of the tensor `name` of a state. `segments` has the rows of `Conversion.state_dict`."""
    names, strides = list(stored), row_major(shape)
    parts = [
        Segment(
            tuple(row[3 : 3 + len(shape)]),
            Position(name, row[1], strides),
            Position(names[row[0]], row[2], tuple(row[3 + len(shape) :])),
        )
        for row in segments.tolist()
    ]
    return Made(shape, Segments(parts), stored)


def row_major(shape: Shape) -> Shape:
    """Return the strides of a contiguous tensor."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


@runtime_checkable
class Converting(Protocol):
    """The optional methods of a candidate whose tensors differ from the stored ones."""

    def made(self, name: str) -> Made | None:
        """Return the segments of which a tensor is made, or None if it is stored unchanged."""

    def conversion(self) -> Conversion | None:
        """Return the conversion of all its tensors, or None if nothing is converted."""


def made(candidate: Candidate, name: str) -> Made | None:
    """Return the segments of which a tensor is made, or None if it is stored unchanged under any name."""
    return candidate.made(name) if isinstance(candidate, Converting) else None


def conversion(candidate: Candidate) -> Conversion | None:
    """Return the conversion of the tensors of a candidate, or None if nothing is converted."""
    return candidate.conversion() if isinstance(candidate, Converting) else None


def conversions(candidates: Sequence[Candidate]) -> list[Conversion]:
    """Return the conversions of candidates, each once."""
    all_conversions = [conversion(candidate) for candidate in candidates]
    return list(dict.fromkeys(entry for entry in all_conversions if entry is not None))
