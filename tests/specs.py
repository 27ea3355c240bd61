"""The candidates that a user's paths stand for."""

import pytest

from twa_scale.candidates import open_candidates
from twa_scale.candidates.find import find_sources
from twa_scale.errors import CandidateError


def found(spec: object) -> tuple[list[str], list[str]]:
    """Return the paths, and the messages."""
    messages: list[str] = []
    return [str(path) for path in find_sources(spec, 1, messages.append)], messages  # type: ignore[arg-type]


def refused(spec: object) -> str:
    """Return the error message of refused paths."""
    with pytest.raises(CandidateError) as error:
        open_candidates(spec, minimum=1)  # type: ignore[arg-type]
    return str(error.value)
