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
    """What a candidate may offer beside reading."""

    def mapped(self, name: str) -> torch.Tensor | None:
        """Return a whole tensor, flattened, as a view of the file or memory that holds it; None if that cannot be."""


def refuse_overlap(candidates: Sequence[Candidate], names: Sequence[str], live: Iterable[torch.Tensor]) -> None:
    """Refuse candidates in memory whose tensors are those of the model: every step would overwrite them.

    Raises:
        ConfigError: naming the candidate and the tensor.
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
                    f"store: 'mapped' reads the candidates where they lie, but {name!r} of {candidate.label} is in "
                    "the memory of the model, which every step overwrites. Give a copy (tensor.clone()), or take "
                    "another store."
                )


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor's memory, and the one after its last."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def mapped(candidate: Candidate, name: str) -> torch.Tensor:
    """Return a view of a whole tensor of a candidate, flattened.

    Raises:
        ConfigError: a candidate that can only be read, or that the system does not map.
        CandidateError: a file that was changed since it was opened.
    """
    try:
        view = candidate.mapped(name) if isinstance(candidate, Mappable) else None
    except OSError as error:
        full = error.errno == errno.ENOMEM  # the system counts what could be written to, and nothing is
        why = ": it has more bytes than this machine would give one process" if full else ""
        raise ConfigError(
            f"store: {candidate.label} cannot be mapped ({error.strerror or error}){why}. Use packed8 or packed4."
        ) from None
    if view is None:
        raise ConfigError(
            f"store: 'mapped' needs candidates whose tensors lie in one piece in safetensors files; {name!r} of "
            f"{candidate.label} does not. Use packed8 or packed4, or convert the candidate (`twa-scale average PATH "
            "--out NEW`)."
        )
    return view
