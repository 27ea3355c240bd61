"""Destroying process groups without a deadlock of torch before 2.8."""

import time
from collections import deque

import torch
import torch.distributed as dist

from twa_scale.ranks.timeouts import process_groups

# The destructor of a gloo group waits for the threads of the group. Before torch 2.8 it holds the interpreter's lock
# meanwhile. A thread that is about to release a tensor of the last collective needs that lock: both wait for ever.
# So the objects are kept until a later call, SECONDS or more after the groups were destroyed. Their threads are idle
# then.
SECONDS = 1.0
KEPT: deque[tuple[float, list[dist.ProcessGroup]]] = deque()


def destroy_process_group(group: dist.ProcessGroup | None = None) -> None:
    """Destroy a process group, or all of them, as `torch.distributed.destroy_process_group` does."""
    if torch.__version__ < "2.8":
        now = time.monotonic()
        while KEPT and KEPT[0][0] < now - SECONDS:
            KEPT.popleft()
        KEPT.append((now, (process_groups() or []) if group is None else [group]))
    dist.destroy_process_group(group)
