"""Blocks that hold collectives and that a rank may leave by an error: whether the other ranks have left them too."""

import secrets
import time
from typing import Any

from twa_scale.errors import RankError
from twa_scale.ranks.failures import answer, own_store
from twa_scale.ranks.group import Group

_PATIENCE = 5.0  # seconds that others have to leave a block after a rank has left it by an error
_POLL = 0.05


class Departures:
    """Tells which blocks each rank of a group has left, in the store through which the ranks met.

    A rank that leaves a block by an error cannot ask the others by a collective: they may still be in the block, in
    another one. Where the store does not answer, ranks learn from a collective that fails.

    Args:
        group: ranks that enter and leave the same blocks in the same order. Collective.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._name = f"twa-scale/left/{group.broadcast(secrets.token_hex(8))}"
        self._left = 0
        self._store: Any = None

    def note(self) -> None:
        """Tell the others that this rank has left one more block."""
        self._left += 1
        answer(self._tell_left)

    def all_left(self) -> bool:
        """Return whether all ranks have left the block that this one has left last, after a moment if need be.

        Where it is False this rank will not come to another collective, and the others are told so.
        """
        deadline = time.monotonic() + _PATIENCE
        left = answer(lambda: self._wait(deadline), 2 * _PATIENCE)
        if not left:
            self.give_up()
        return bool(left)

    def give_up(self) -> None:
        """Tell the others that this rank will not come to another collective."""
        answer(lambda: self._connected().set(self._gone, str(self._group.rank)))

    def require_all(self) -> None:
        """Refuse to wait for a rank that has told that it will not come.

        Raises:
            RankError: names it by its number in the group.
        """
        gone = answer(self._who_has_gone)
        if gone is not None:
            raise RankError(f"rank {gone} of this group has failed in a block that the other ranks have left.")

    def _tell_left(self) -> None:
        store = self._connected()
        store.set(self._key(self._group.rank, self._left), "")
        if self._left > 1:  # the end of that block was collective: nobody asks for it any more
            store.delete_key(self._key(self._group.rank, self._left - 1))

    def _wait(self, deadline: float) -> bool:
        store = self._connected()
        keys = [self._key(rank, self._left) for rank in range(self._group.size)]
        while not store.check(keys):
            if time.monotonic() > deadline or store.check([self._gone]):
                return False
            time.sleep(_POLL)
        return not store.check([self._gone])

    def _who_has_gone(self) -> int | None:
        store = self._connected()
        return int(store.get(self._gone)) if store.check([self._gone]) else None

    def _connected(self) -> Any:
        self._store = self._store or own_store()
        return self._store

    @property
    def _gone(self) -> str:
        return f"{self._name}/gone"

    def _key(self, rank: int, block: int) -> str:
        return f"{self._name}/{block}/{rank}"
