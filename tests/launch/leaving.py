"""A rank that exits while threads of gloo hold Python tensors. Started by test_ending.py."""

import sys

import torch
import torch.distributed as dist

from twa_scale.ranks import World, exit_process

with World.from_environment().joined(torch.device("cpu"), sys.argv[1]):
    group = dist.group.WORLD  # keeps its threads, as the caches of torch and DeepSpeed do
    assert group is not None
    for _ in range(50):
        group.allgather([[torch.empty(1000), torch.empty(1000)]], [torch.ones(1000)])
exit_process(75)
