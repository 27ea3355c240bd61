"""Candidates with tensors that are multiplied by a number."""

from collections.abc import Mapping

import torch

from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.proxy import CandidateProxy


class Rescaled(CandidateProxy):
    """A view of another candidate, in which some tensors are multiplied by a number, in float32 or wider.

    Args:
        candidate: the other candidate.
        scales: the factors by tensor name. Other tensors are unchanged.
    """

    def __init__(self, candidate: Candidate, scales: Mapping[str, float]) -> None:
        super().__init__(candidate)
        self.scales = {name: scale for name, scale in scales.items() if scale != 1}

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor in `read`."""
        dtype = super().dtype(name)
        return torch.promote_types(dtype, torch.float32) if name in self.scales else dtype

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the type that the tensor has in the file."""
        return super().dtype(name)

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with the elements from `start` on."""
        if name not in self.scales:
            super().read(name, start, out)
            return
        values = torch.empty(len(out), dtype=super().dtype(name))
        super().read(name, start, values)
        out.copy_(values).mul_(self.scales[name])

    def mapped(self, name: str) -> torch.Tensor | None:
        """Return a flat view of a whole tensor, or None for a multiplied one."""
        return None if name in self.scales else super().mapped(name)

    def stored_once(self, name: str, other: str) -> bool:
        """Return whether two names refer to one tensor."""
        return self.scales.get(name) == self.scales.get(other) and super().stored_once(name, other)
