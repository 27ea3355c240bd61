"""Checks that values are equal on all ranks: each rank compares its own with those of the first rank."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeVar

from twa_scale.errors import ConfigError
from twa_scale.ranks.ranks import Ranks

K = TypeVar("K", bound=Hashable)
_ABSENT = "nothing"


@dataclass(frozen=True)
class Difference:
    """An entry whose value on this rank differs from the value on the first rank."""

    key: Any
    local: object
    first: object
    location: str
    """The name of this rank, for messages."""
    first_location: str
    """The name of the first rank, for messages."""


def first_difference(group: Ranks, entries: Mapping[K, object]) -> Difference | None:
    """Return the first of `entries` that differs from the first rank of `group`, or None. Collective.

    Ranks exchange only digests of 32 bytes if all entries are equal. Only a rank whose entries differ returns a
    difference, so raise errors about it inside `Ranks.agree`.
    """
    if group.size == 1:
        return None
    digest = sha256(repr(list(entries.items())).encode()).digest()
    if len(set(group.gather(digest))) == 1:
        return None
    location = group.name
    where_first, first = group.broadcast((location, dict(entries)))
    for key in (*entries, *(key for key in first if key not in entries)):
        local, other = entries.get(key, _ABSENT), first.get(key, _ABSENT)
        if repr(local) != repr(other):  # NaN is not equal to itself
            return Difference(key, local, other, location, where_first)
    return None


def require_same_settings(group: Ranks, settings: Mapping[str, object]) -> None:
    """Raise an error if settings differ between ranks, which would hang or give different results. Collective.

    Raises:
        ConfigError: a setting differs. Raised on every rank.
    """
    other = first_difference(group, settings)
    with group.agree():
        if other:
            raise ConfigError(
                f"{other.key}: {other.location} has {other.local!r} and {other.first_location} has {other.first!r}; "
                "give all ranks the same."
            )
