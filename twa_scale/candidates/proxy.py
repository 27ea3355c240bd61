"""The base class of candidates that present another candidate in another form."""

from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.conversion import Conversion, Made, conversion, made
from twa_scale.candidates.formats.origin import Origin, origin_of
from twa_scale.candidates.mapped import Mappable


@runtime_checkable
class Sharing(Protocol):
    """The optional method of a candidate that can store a tensor once under several names."""

    def stored_once(self, name: str, other: str) -> bool:
        """Return whether two names refer to one tensor in the file or memory."""


def stored_once(candidate: Candidate, name: str, other: str) -> bool:
    """Return whether two names are known to refer to one tensor, without reading it."""
    return isinstance(candidate, Sharing) and candidate.stored_once(name, other)


class CandidateProxy:
    """A candidate that forwards all calls to another one. Subclasses override some methods."""

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate
        self.label: str = candidate.label
        self.directory: Path | None = candidate.directory
        self.file_name: str | None = candidate.file_name
        self.metadata = candidate.metadata
        self.stored_names = candidate.stored_names

    @property
    def bytes_read(self) -> int:
        """The bytes of tensor data that `read` has read in this process."""
        return self._candidate.bytes_read

    @bytes_read.setter
    def bytes_read(self, value: int) -> None:
        self._candidate.bytes_read = value

    @property
    def origin(self) -> Origin:
        """The format of the candidate, and the positions of the weights in its files."""
        return origin_of(self._candidate)

    def names(self) -> list[str]:
        """Return the tensor names, sorted."""
        return self._candidate.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._candidate.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor in `read`."""
        return self._candidate.dtype(name)

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with the elements from `start` on."""
        self._candidate.read(name, start, out)

    def mapped(self, name: str) -> torch.Tensor | None:
        """Return a flat view of a whole tensor, or None if the candidate has none."""
        return self._candidate.mapped(name) if isinstance(self._candidate, Mappable) else None

    def stored_once(self, name: str, other: str) -> bool:
        """Return whether two names refer to one tensor."""
        return stored_once(self._candidate, name, other)

    def made(self, name: str) -> Made | None:
        """Return the segments of which a tensor is made, or None if it is stored unchanged."""
        return made(self._candidate, name)

    def conversion(self) -> Conversion | None:
        """Return the conversion of all tensors, or None if nothing is converted."""
        return conversion(self._candidate)

    def close(self) -> None:
        """Close the candidate."""
        self._candidate.close()
