"""Blocks that hold collectives and that a rank may leave by an error: whether the other ranks have left them too."""

import secrets
import time
from contextlib import suppress
from typing import Any

from twa_scale.errors import RankError
from twa_scale.ranks.comm import Group
from twa_scale.ranks.presence import own_store

_PATIENCE = 5.0  # seconds that others have to leave a block after a rank has left it by an error
_POLL = 0.05
_GONE = -1


class Departures:
    """Counts the blocks that each rank of a group has left, in the store through which the ranks met.

    A rank that leaves a block by an error cannot ask the others by a collective: they may still be in the block, in
    another one.

    Args:
        group: ranks that enter and leave the same blocks in the same order. Collective.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._name = group.broadcast(secrets.token_hex(8))
        self._left = 0
        self._store: Any = None

    def note(self) -> None:
        """Tell the others that this rank has left one more block."""
        self._left += 1
        self._tell(self._left)

    def all_left(self) -> bool:
        """Return whether all ranks have left the block that this one has left last, after a moment if need be.

        Where it is False this rank will not come to another collective, and the others are told so.
        """
        others = set(range(self._group.size)) - {self._group.rank}
        deadline = time.monotonic() + _PATIENCE
        with suppress(Exception):
            while self._gone() is None:
                others = {rank for rank in others if self._count(rank) < self._left}
                if not others:
                    return True
                if time.monotonic() > deadline:
                    break
                time.sleep(_POLL)
        self.give_up()
        return False

    def give_up(self) -> None:
        """Tell the others that this rank will not come to another collective."""
        self._tell(_GONE)

    def require_all(self) -> None:
        """Refuse to wait for a rank that has told that it will not come.

        Raises:
            RankError: names it by its number in the group.
        """
        gone = None
        with suppress(Exception):
            gone = self._gone()
        if gone is not None:
            raise RankError(f"rank {gone} of this shard group has failed in a block that the other ranks have left.")

    def _gone(self) -> int | None:
        return next((rank for rank in range(self._group.size) if self._count(rank) == _GONE), None)

    def _tell(self, count: int) -> None:
        if self._group.size > 1:
            with suppress(Exception):  # without a store the others learn from a collective that fails
                self._store = self._store or own_store()
                self._store.set(self._key(self._group.rank), str(count))

    def _count(self, rank: int) -> int:
        key = self._key(rank)
        return int(self._store.get(key)) if self._store.check([key]) else 0

    def _key(self, rank: int) -> str:
        return f"twa-scale/left/{self._name}/{rank}"
