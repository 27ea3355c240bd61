"""Candidates whose tensors can be mapped into memory instead of read: safetensors files and state dicts."""

import errno
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import torch

from twa_scale.candidates.candidate import Candidate
from twa_scale.errors import ConfigError


@runtime_checkable
class Mappable(Protocol):
    """The optional method of a candidate that can be mapped."""

    def mapped(self, name: str) -> torch.Tensor | None:
        """Return a flat view of a whole tensor in its file or memory, or None if that is not possible."""


def refuse_overlap(candidates: Sequence[Candidate], names: Sequence[str], live: Iterable[torch.Tensor]) -> None:
    """Check that no candidate shares memory with the model, whose steps would overwrite it.

    Raises:
        ConfigError: names the candidate and the tensor.
    """
    ranges = sorted(_range(tensor) for tensor in live if tensor.numel())
    starts = [start for start, _ in ranges]
    for candidate in candidates:
        for name in names:
            view = mapped(candidate, name)
            if not view.numel():
                continue
            start, stop = _range(view)
            before = bisect_left(starts, stop) - 1
            if before >= 0 and ranges[before][1] > start:
                raise ConfigError(
                    f"store: 'mapped' reads the candidates in place, but {name!r} of {candidate.label} is in "
                    "the memory of the model, which every step overwrites. Give a copy (tensor.clone()), or use "
                    "another store."
                )


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte of a tensor's memory and of the byte after the last."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def mapped(candidate: Candidate, name: str) -> torch.Tensor:
    """Return a flat view of a whole tensor of a candidate.

    Raises:
        ConfigError: the candidate can only be read, or the system does not map it.
        CandidateError: a file was changed since it was opened.
    """
    try:
        view = candidate.mapped(name) if isinstance(candidate, Mappable) else None
    except OSError as error:
        # The system counts memory that could be written, although nothing is written.
        full = error.errno == errno.ENOMEM
        reason = ": it has more bytes than the system allows for one process" if full else ""
        raise ConfigError(
            f"store: {candidate.label} cannot be mapped ({error.strerror or error}){reason}. Use packed8 or packed4."
        ) from None
    if view is None:
        raise ConfigError(
            f"store: 'mapped' needs candidates whose tensors are contiguous in safetensors files; {name!r} of "
            f"{candidate.label} is not. Use packed8 or packed4, or convert the candidate (`twa-scale average PATH "
            "--out NEW`)."
        )
    return view
