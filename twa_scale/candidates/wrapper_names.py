"""Names of the tensors of a candidate without wrappers, and the names that its files use."""

from collections.abc import Iterable

from twa_scale.base.names import without_wrappers
from twa_scale.errors import CandidateError


def unwrapped(raw_names: Iterable[str], label: str) -> dict[str, str]:
    """Map each name without wrappers to the one in the file, sorted.

    Raises:
        CandidateError: two tensors have the same name without wrappers.
    """
    raw_of: dict[str, str] = {}
    for raw, name in without_wrappers(raw_names).items():
        if name in raw_of:
            raise CandidateError(
                f"{label}: tensors {raw_of[name]!r} and {raw!r} are both {name!r} without prefixes of wrappers; a "
                "candidate must have each tensor once. Remove one of the two from the file."
            )
        raw_of[name] = raw
    return dict(sorted(raw_of.items()))
