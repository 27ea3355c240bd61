"""Candidates with complex tensors: to what reads them, each is real and has one dimension more."""

from pathlib import Path

import torch

from twa_scale.sources.mapped import Mappable
from twa_scale.sources.protocol import Candidate
from twa_scale.sources.view import stored_once


def in_pairs(candidate: Candidate) -> Candidate:
    """Return a candidate that presents complex tensors as pairs; the candidate itself where there are none."""
    return PairsCandidate(candidate) if any(candidate.dtype(n).is_complex for n in candidate.names()) else candidate


def complex_in_files(candidate: Candidate) -> frozenset[str]:
    """Return the tensors that are complex where they are stored."""
    return candidate.complex_names if isinstance(candidate, PairsCandidate) else frozenset()


class PairsCandidate:
    """Another candidate, whose complex tensors have the shape (.., 2) of real and imaginary part, and a real type."""

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate
        self.label: str = candidate.label
        self.directory: Path | None = candidate.directory
        self.file_name: str | None = candidate.file_name
        self.metadata = candidate.metadata
        self.stored_names = candidate.stored_names
        self.complex_names = frozenset(name for name in candidate.names() if candidate.dtype(name).is_complex)

    @property
    def bytes_read(self) -> int:
        """Bytes that `read` has taken from it."""
        return self._candidate.bytes_read

    @bytes_read.setter
    def bytes_read(self, value: int) -> None:
        self._candidate.bytes_read = value

    def names(self) -> list[str]:
        """Return the tensor names."""
        return self._candidate.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        shape = self._candidate.shape(name)
        return (*shape, 2) if name in self.complex_names else shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the type in which `read` delivers a tensor."""
        dtype = self._candidate.dtype(name)
        return dtype.to_real() if dtype.is_complex else dtype

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with the elements from `start` on; a range may begin and end within a pair."""
        if name not in self.complex_names:
            self._candidate.read(name, start, out)
            return
        first, last = start // 2, -(-(start + len(out)) // 2)
        numbers = torch.empty(last - first, dtype=self._candidate.dtype(name))
        self._candidate.read(name, first, numbers)
        out.copy_(torch.view_as_real(numbers).view(-1)[start - 2 * first :][: len(out)])

    def mapped(self, name: str) -> torch.Tensor | None:
        """Return a view of a whole tensor, flattened; None where the candidate has none."""
        view = self._candidate.mapped(name) if isinstance(self._candidate, Mappable) else None
        return torch.view_as_real(view).view(-1) if view is not None and name in self.complex_names else view

    def stored_once(self, name: str, other: str) -> bool:
        """Whether two names stand for one tensor."""
        return stored_once(self._candidate, name, other)

    def close(self) -> None:
        """Release files and memory."""
        self._candidate.close()
