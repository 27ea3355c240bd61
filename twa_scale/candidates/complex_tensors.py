"""Candidates with complex tensors, which are presented as real tensors with one more dimension."""

import torch

from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.proxy import CandidateProxy


def in_pairs(candidate: Candidate) -> Candidate:
    """Return a candidate that presents complex tensors as pairs, or the candidate itself if it has none."""
    return PairsCandidate(candidate) if any(candidate.dtype(n).is_complex for n in candidate.names()) else candidate


def complex_in_files(candidate: Candidate) -> frozenset[str]:
    """Return the names of tensors that are complex in the files."""
    return candidate.complex_names if isinstance(candidate, PairsCandidate) else frozenset()


class PairsCandidate(CandidateProxy):
    """A view of a candidate in which complex tensors are real tensors of shape (.., 2): real and imaginary parts."""

    def __init__(self, candidate: Candidate) -> None:
        super().__init__(candidate)
        self.complex_names = frozenset(name for name in candidate.names() if candidate.dtype(name).is_complex)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        shape = super().shape(name)
        return (*shape, 2) if name in self.complex_names else shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor in `read`."""
        dtype = super().dtype(name)
        return dtype.to_real() if dtype.is_complex else dtype

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with the elements from `start` on; a range may start and end within a pair."""
        if name not in self.complex_names:
            super().read(name, start, out)
            return
        first, last = start // 2, -(-(start + len(out)) // 2)
        numbers = torch.empty(last - first, dtype=super().dtype(name))
        super().read(name, first, numbers)
        out.copy_(torch.view_as_real(numbers).view(-1)[start - 2 * first :][: len(out)])

    def mapped(self, name: str) -> torch.Tensor | None:
        """Return a flat view of a whole tensor, or None if the candidate has none."""
        view = super().mapped(name)
        return torch.view_as_real(view).view(-1) if view is not None and name in self.complex_names else view
