"""Exits from blocks with collectives: whether all ranks have left a block that one of them left with an error."""

import secrets
import time
from typing import Any

from twa_scale.errors import RankError
from twa_scale.ranks.failures import call_with_timeout, connect_to_store
from twa_scale.ranks.group import Group

_WAIT_SECONDS = 5.0  # seconds that other ranks have to leave a block after one has left it with an error
_POLL = 0.05


class BlockExits:
    """A record, in the rendezvous store, of the blocks that each rank of a group has left.

    A rank that leaves a block with an error cannot ask the others in a collective, because they may be in a collective
    of the block. If the store does not answer, the other ranks get the error of a failed collective.

    Args:
        group: ranks that enter and leave the same blocks in the same order. The constructor is collective.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._prefix = f"twa-scale/left/{group.broadcast(secrets.token_hex(8))}"
        self._num_left = 0
        self._store: Any = None

    def record(self) -> None:
        """Record that this rank has left one more block."""
        self._num_left += 1
        call_with_timeout(self._write)

    def all_left(self) -> bool:
        """Return whether all ranks leave the last block of this rank within five seconds.

        If they do not, record that this rank takes part in no further collective.
        """
        deadline = time.monotonic() + _WAIT_SECONDS
        left = call_with_timeout(lambda: self._wait(deadline), 2 * _WAIT_SECONDS)
        if not left:
            self.give_up()
        return bool(left)

    def give_up(self) -> None:
        """Record that this rank takes part in no further collective."""
        call_with_timeout(lambda: self._connected().set(self._gone_key, str(self._group.rank)))

    def require_all(self) -> None:
        """Check that no rank has given up.

        Raises:
            RankError: a rank has given up. The message has its number in the group.
        """
        gone = call_with_timeout(self._rank_that_gave_up)
        if gone is not None:
            raise RankError(f"rank {gone} of this group has failed in a block that the other ranks have left.")

    def _write(self) -> None:
        store = self._connected()
        store.set(self._key(self._group.rank, self._num_left), "")
        if self._num_left > 1:  # The exit from the block before was collective, so no rank reads its key any more.
            store.delete_key(self._key(self._group.rank, self._num_left - 1))

    def _wait(self, deadline: float) -> bool:
        store = self._connected()
        keys = [self._key(rank, self._num_left) for rank in range(self._group.size)]
        while not store.check(keys):
            if time.monotonic() > deadline or store.check([self._gone_key]):
                return False
            time.sleep(_POLL)
        return not store.check([self._gone_key])

    def _rank_that_gave_up(self) -> int | None:
        store = self._connected()
        return int(store.get(self._gone_key)) if store.check([self._gone_key]) else None

    def _connected(self) -> Any:
        self._store = self._store or connect_to_store()
        return self._store

    @property
    def _gone_key(self) -> str:
        return f"{self._prefix}/gone"

    def _key(self, rank: int, block: int) -> str:
        return f"{self._prefix}/{block}/{rank}"
