"""A rank that ends while threads of gloo still hold tensors of Python; test_ending.py starts it."""

import sys

import torch
import torch.distributed as dist

from twa_scale.ranks import World, end

with World.from_environment().joined(torch.device("cpu"), sys.argv[1]):
    group = dist.group.WORLD  # keeps its threads, as the caches of torch and DeepSpeed do
    assert group is not None
    for _ in range(50):
        group.allgather([[torch.empty(1000), torch.empty(1000)]], [torch.ones(1000)])
end(75)
