"""Exits from blocks with collectives: whether all ranks have left a block that one of them left with an error."""

import secrets
import time
from typing import Any

from twa_scale.errors import RankError
from twa_scale.ranks.failures import call_with_timeout, connect_to_store
from twa_scale.ranks.ranks import Ranks

_WAIT_SECONDS = 5.0  # seconds that other ranks have to leave a block after one has left it with an error
_POLL = 0.05
_DECISION, _LEFT, _GONE = "decision", "left", "gone"


class BlockExits:
    """A record, in the rendezvous store, of the blocks that each rank of a group has left.

    A rank that leaves a block with an error cannot ask the others in a collective, because they may be in a collective
    of the block. The last rank that leaves a block and the one that gives up waiting set the same key of the store, so
    that all ranks follow the first of them. If the store does not answer, the other ranks get the error of a failed
    collective.

    Args:
        group: ranks that enter and leave the same blocks in the same order. The constructor is collective.
    """

    def __init__(self, group: Ranks) -> None:
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
        left = call_with_timeout(lambda: self._decided(_LEFT if self._wait(deadline) else _GONE), 2 * _WAIT_SECONDS)
        if left != _LEFT:
            self.give_up()
        return left == _LEFT

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
            raise RankError(f"{gone} of this group has failed in a block that the other ranks have left.")

    def _write(self) -> None:
        store = self._connected()
        store.set(self._key(self._group.rank, self._num_left), "")
        if self._num_left > 1:  # The exit from the block before was collective, so no rank reads its keys any more.
            store.delete_key(self._key(self._group.rank, self._num_left - 1))
            if self._group.rank == 0:
                store.delete_key(self._key(_DECISION, self._num_left - 1))

    def _wait(self, deadline: float) -> bool:
        while not self._all_recorded():
            if time.monotonic() > deadline or self._connected().check([self._gone_key]):
                return False
            time.sleep(_POLL)
        return not self._connected().check([self._gone_key])

    def _all_recorded(self) -> bool:
        keys = [self._key(rank, self._num_left) for rank in range(self._group.size)]
        return bool(self._connected().check(keys))

    def _decided(self, proposal: str) -> str:
        """Return whether all ranks have left the block or one has given up: the first proposal of any rank."""
        decision: bytes = self._connected().compare_set(self._key(_DECISION, self._num_left), "", proposal)
        return decision.decode()

    def _rank_that_gave_up(self) -> str | None:
        store = self._connected()
        if store.check([self._gone_key]):
            return f"rank {store.get(self._gone_key).decode()}"
        return "another rank" if self._all_recorded() and self._decided(_LEFT) == _GONE else None

    def _connected(self) -> Any:
        self._store = self._store or connect_to_store()
        return self._store

    @property
    def _gone_key(self) -> str:
        return f"{self._prefix}/gone"

    def _key(self, item: int | str, block: int) -> str:
        return f"{self._prefix}/{block}/{item}"
