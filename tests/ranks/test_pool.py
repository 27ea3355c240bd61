"""The pool returns results by rank, and errors unchanged. No test hangs."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from tests.pool import Pool, RanksDisagree, RanksHang
from twa_scale.errors import CandidateError


def total(value: float) -> tuple[int, int, float]:
    tensor = torch.tensor(value * (dist.get_rank() + 1))
    dist.all_reduce(tensor)
    return dist.get_rank(), dist.get_world_size(), tensor.item()


def refuse(rank: int | None = None) -> None:
    if rank in (None, dist.get_rank()):
        raise CandidateError("candidate 'x' is not one")


def wait_for_one_that_raises(rank: int) -> None:
    refuse(rank)
    dist.barrier()


def never_meet() -> None:
    if dist.get_rank() == 0:
        dist.barrier()
    else:
        dist.recv(torch.zeros(1), 0)


def die() -> None:
    os._exit(3)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_results_by_rank(ranks: Pool, size: int) -> None:
    assert ranks(total, size, value=1.0) == [(r, size, size * (size + 1) / 2) for r in range(size)]


def test_error_of_every_rank_is_raised_unchanged(ranks: Pool) -> None:
    with pytest.raises(CandidateError, match="candidate 'x'"):
        ranks(refuse, 2)
    assert isinstance(ranks.error(refuse, 3), CandidateError)


def test_error_of_one_rank_is_reported(ranks: Pool) -> None:
    with pytest.raises(RanksDisagree, match=r"rank 1 raised CandidateError.*ranks 0, 2 did not"):
        ranks(refuse, 3, rank=1)
    with pytest.raises(RanksDisagree, match="rank 1 raised CandidateError"):
        ranks(wait_for_one_that_raises, 3, rank=1)


def test_hanging_rank_is_killed_and_the_pool_remains_usable(ranks: Pool) -> None:
    with pytest.raises(RanksHang, match="never_meet"):
        ranks(never_meet, 2, timeout=3.0)
    assert len(ranks(total, 2, value=1.0)) == 2


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_the_stack_of_a_rank_that_crashed_is_reported(ranks: Pool) -> None:
    with pytest.raises(RanksHang, match=r"(?s)exit code -11.*Segmentation fault.*in crash"):
        ranks(crash, 1)
    assert len(ranks(total, 1, value=1.0)) == 1


def test_dead_rank_is_reported(ranks: Pool) -> None:
    with pytest.raises(RanksHang, match="exit code 3"):
        ranks(die, 2)
    assert len(ranks(total, 2, value=1.0)) == 2
