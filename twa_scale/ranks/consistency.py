"""What has to be the same on every rank: each compares its own with that of the first rank."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeVar

from twa_scale.errors import ConfigError
from twa_scale.ranks.group import Group

K = TypeVar("K", bound=Hashable)
_ABSENT = "nothing"


@dataclass(frozen=True)
class Difference:
    """An entry that this rank has otherwise than the first rank."""

    key: Any
    mine: object
    first: object
    where: str
    """What messages call this rank."""
    where_first: str
    """What messages call the first rank."""


def first_difference(group: Group, entries: Mapping[K, object]) -> Difference | None:
    """Return the first of `entries` that is not what the first rank of `group` has, or None. Collective.

    Ranks exchange 32 bytes where all have the same. Only a rank with a difference returns one: raise inside
    `Group.agree`.
    """
    if group.size == 1:
        return None
    digest = sha256(repr(list(entries.items())).encode()).digest()
    if len(set(group.gather(digest))) == 1:
        return None
    where = group.name
    where_first, first = group.broadcast((where, dict(entries)))
    for key in (*entries, *(key for key in first if key not in entries)):
        mine, other = entries.get(key, _ABSENT), first.get(key, _ABSENT)
        if mine != other:
            return Difference(key, mine, other, where, where_first)
    return None


def require_same_settings(group: Group, settings: Mapping[str, object]) -> None:
    """Refuse settings that differ between ranks: these would wait for each other, or part. Collective.

    Raises:
        ConfigError: on every rank, with the first setting that differs.
    """
    other = first_difference(group, settings)
    with group.agree():
        if other:
            raise ConfigError(
                f"{other.key}: {other.where} has {other.mine!r} and {other.where_first} has {other.first!r}; give all "
                "ranks the same."
            )
