"""The interface of a candidate."""

from pathlib import Path
from typing import Protocol

import torch


class Candidate(Protocol):
    """One set of weights, read by slices.

    The interface has no way to read a whole tensor, because no rank needs one, and no way to write. It does not depend
    on ranks: the caller decides which slices to read.
    """

    label: str
    """The name in messages: the path, or the position among in-memory candidates."""
    directory: Path | None
    """The folder of the candidate, if it has its own folder, with its config and tokenizer files."""
    file_name: str | None
    """The name of its file of weights, or of the index of several files; None in other cases."""
    metadata: dict[str, str]
    """The metadata in the header of its safetensors file."""
    stored_names: dict[str, str]
    """The name of each tensor in the files of the candidate, which loaders expect, by its name here."""

    bytes_read: int
    """The bytes of tensor data that `read` has read in this process."""

    def names(self) -> list[str]:
        """Return the tensor names without wrappers, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor in `read`."""

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` (1-D, contiguous, CPU, of dtype(name)) with the elements from `start` on, in row-major order.

        Raises:
            CandidateError: the file is too short, or was changed or removed.
        """

    def close(self) -> None:
        """Release files and memory."""
