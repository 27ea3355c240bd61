"""The interface of a candidate."""

from pathlib import Path
from typing import Protocol

import torch


class Candidate(Protocol):
    """One set of weights, read by slices.

    Reading a whole tensor is left out on purpose: no rank ever needs one. So is writing, and any knowledge of ranks:
    who reads which slice is the caller's business.
    """

    label: str
    """What messages call it: its path, or its place among in-memory candidates."""
    directory: Path | None
    """The folder that holds it, when that is a folder of its own (its config and tokenizer files are there)."""
    file_name: str | None
    """The name of its file of weights, or of the index of several; None where it is kept otherwise."""
    metadata: dict[str, str]
    """What the header of its safetensors says beside the tensors."""
    stored_names: dict[str, str]
    """The name of each tensor in the candidate's own files, which what loads them expects, by its name here."""

    bytes_read: int
    """Bytes of tensor data that `read` has taken from it in this process."""

    def names(self) -> list[str]:
        """Return the tensor names without wrappers, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the type in which `read` delivers a tensor."""

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` (1-D, contiguous, CPU, of dtype(name)) with the elements from `start` on, in row-major order.

        Raises:
            CandidateError: the file ended, changed or vanished.
        """

    def close(self) -> None:
        """Release files and memory."""
