"""Pairs of ranks that exit while threads of gloo hold Python tensors. test_exit_code.py starts them.

Ranks are forks of this process, which has imported torch once.
"""

import os
import sys
from typing import NoReturn

import torch
import torch.distributed as dist

from twa_scale.ranks import World, exit_process

PAIRS = 4
kept: list[dist.ProcessGroup] = []


def leave(directory: str) -> NoReturn:
    """Join the other rank, use gloo, and exit."""
    with World.from_environment().joined(torch.device("cpu"), directory):
        group = dist.group.WORLD
        assert group is not None
        kept.append(group)  # keeps its threads until the interpreter ends, as the caches of torch and DeepSpeed do
        for _ in range(50):
            group.allgather([[torch.empty(1000), torch.empty(1000)]], [torch.ones(1000)])
    exit_process(75)


def start(rank: int, directory: str) -> int:
    """Return the process id of a rank."""
    child = os.fork()
    if child:
        return child
    os.environ |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
    leave(directory)


for pair in range(PAIRS):
    ranks = [start(rank, f"{sys.argv[1]}/{pair}") for rank in range(2)]
    print(*(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks), flush=True)
