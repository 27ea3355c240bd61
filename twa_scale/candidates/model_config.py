"""Read the config.json of a candidate."""

from typing import Any

from twa_scale.base.inputs import MAX_JSON, parse_json, read_bounded
from twa_scale.candidates.candidate import Candidate
from twa_scale.errors import CandidateError


def settings_of(candidate: Candidate) -> dict[str, Any]:
    """Return the content of config.json in the candidate's directory; empty if it cannot be read."""
    path = candidate.directory / "config.json" if candidate.directory else None
    if path is None or not path.is_file():
        return {}
    try:
        settings = parse_json(read_bounded(path, MAX_JSON))
    except (CandidateError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}
