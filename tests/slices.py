"""Read candidates in tests: a slice at a time, or with the error that they raise."""

from pathlib import Path

import pytest
import torch

from twa_scale.candidates import Candidate, open_candidates
from twa_scale.errors import CandidateError


def opened(path: Path) -> Candidate:
    """Open a single candidate."""
    return open_candidates([path], minimum=1)[0]


def read(candidate: Candidate, name: str, start: int, stop: int) -> torch.Tensor:
    """Return elements of a tensor, in the type of the candidate."""
    out = torch.empty(stop - start, dtype=candidate.dtype(name))
    candidate.read(name, start, out)
    return out


def refused(path: Path) -> str:
    """Return the error of opening a candidate or of reading all of its tensors."""
    with pytest.raises(CandidateError) as error:
        candidate = opened(path)
        for name in candidate.names():
            read(candidate, name, 0, torch.Size(candidate.shape(name)).numel())
    return str(error.value)
