"""Some of the tensors of a candidate, under other names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from twa_scale.sources.mapped import Mappable
from twa_scale.sources.protocol import Candidate


@runtime_checkable
class Sharing(Protocol):
    """What a candidate may offer that can store a tensor once under several names."""

    def stored_once(self, name: str, other: str) -> bool:
        """Whether two names stand for one tensor in the file or memory."""


def stored_once(candidate: Candidate, name: str, other: str) -> bool:
    """Whether two names are known to stand for one tensor without reading either."""
    return isinstance(candidate, Sharing) and candidate.stored_once(name, other)


class View:
    """A candidate that shows the tensors `names` of another: the name there, by the name here.

    Two names here may stand for one there, as the names of tied weights do that are stored once.
    """

    def __init__(self, candidate: Candidate, names: Mapping[str, str]) -> None:
        self.label = candidate.label
        self.directory: Path | None = candidate.directory
        self.file_name: str | None = candidate.file_name
        self.metadata = candidate.metadata
        # What is before the name there, as "module.", is before the name here, too.
        self.stored_names = {
            name: candidate.stored_names[own].removesuffix(own) + name
            if candidate.stored_names[own].endswith(own)
            else name
            for name, own in sorted(names.items())
        }
        self._candidate = candidate
        self._names = dict(sorted(names.items()))

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data that `read` has taken from it in this process."""
        return self._candidate.bytes_read

    @bytes_read.setter
    def bytes_read(self, value: int) -> None:
        self._candidate.bytes_read = value

    def names(self) -> list[str]:
        """Return the tensor names, sorted."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._candidate.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        """Return the type in which `read` delivers a tensor."""
        return self._candidate.dtype(self._names[name])

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with the elements from `start` on."""
        self._candidate.read(self._names[name], start, out)

    def mapped(self, name: str) -> torch.Tensor | None:
        """Return a view of a whole tensor, flattened, where the candidate offers one."""
        return self._candidate.mapped(self._names[name]) if isinstance(self._candidate, Mappable) else None

    def stored_once(self, name: str, other: str) -> bool:
        """Whether two names stand for one tensor."""
        return self._names[name] == self._names[other] or stored_once(
            self._candidate, self._names[name], self._names[other]
        )

    def close(self) -> None:
        """Close the candidate."""
        self._candidate.close()
