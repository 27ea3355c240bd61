"""Ranks agree whether all have left a block, also if the last one leaves it while another gives up waiting."""

import pytest
import torch.distributed as dist

from tests.pool import Pool
from twa_scale.errors import RankError
from twa_scale.ranks import block_exit
from twa_scale.ranks.group import Group


def leave_late() -> bool:
    """Return whether this rank goes on. Rank 1 leaves between the last look of rank 0 and its record."""
    exits = block_exit.BlockExits(Group.world())
    give_up, store = exits.give_up, exits._connected()
    if dist.get_rank() == 0:

        def after_the_other() -> None:
            store.set("looked", "")
            store.wait(["left"])
            give_up()

        exits.give_up = after_the_other  # type: ignore[method-assign]
        block_exit._WAIT_SECONDS, wait = 0.1, block_exit._WAIT_SECONDS
        exits.record()
        try:
            return exits.all_left()
        finally:
            block_exit._WAIT_SECONDS = wait
    store.wait(["looked"])
    exits.record()
    try:
        exits.require_all()
    except RankError:
        return False
    finally:
        store.set("left", "")
    return True


def leave() -> bool:
    """Return whether this rank goes on from two blocks, which rank 0 leaves with an error."""
    exits = block_exit.BlockExits(Group.world())
    for _ in range(2):
        exits.record()
        if dist.get_rank() == 0:
            assert exits.all_left()
        else:
            exits.require_all()
        dist.barrier()
    return True


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_go_on(ranks: Pool, size: int) -> None:
    assert all(ranks(leave, size))


def test_a_rank_that_leaves_late_does_not_go_on_alone(ranks: Pool) -> None:
    assert ranks(leave_late, 2) == [False, False]
