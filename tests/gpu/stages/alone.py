"""A process group with one rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from tempfile import mkdtemp

import torch
import torch.distributed as dist

from tests.gpu.stages.setup import Setup


@contextmanager
def alone(setup: Setup) -> Iterator[None]:
    if setup.cuda:
        torch.cuda.set_device(setup.device)
    store = dist.FileStore(f"{mkdtemp(dir=setup.scratch)}/ranks", 1)
    dist.init_process_group(setup.backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        yield
    finally:
        dist.destroy_process_group()
