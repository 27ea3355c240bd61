"""Candidates whose tensors can be seen where they lie, without reading: safetensors files and memory."""

from typing import Protocol, runtime_checkable

import torch

from twa_scale.errors import ConfigError
from twa_scale.sources.protocol import Candidate


@runtime_checkable
class Mappable(Protocol):
    """What a candidate may offer beside reading."""

    def mapped(self, name: str) -> torch.Tensor | None:
        """Return a whole tensor, flattened, as a view of the file or memory that holds it; None if that cannot be."""


def mapped(candidate: Candidate, name: str) -> torch.Tensor:
    """Return a view of a whole tensor of a candidate, flattened.

    Raises:
        ConfigError: a candidate that can only be read.
    """
    try:
        view = candidate.mapped(name) if isinstance(candidate, Mappable) else None
    except OSError as error:  # the system counts what could be written to, and nothing is
        raise ConfigError(
            f"store: {candidate.label} cannot be mapped ({error}): it has more bytes than this machine would give one "
            "process. Use packed8 or packed4."
        ) from None
    if view is None:
        raise ConfigError(
            f"store: 'mapped' needs candidates whose tensors lie in one piece in safetensors files; {name!r} of "
            f"{candidate.label} does not. Use packed8 or packed4, or convert the candidate (`twa-scale average PATH "
            "--out NEW`)."
        )
    return view
