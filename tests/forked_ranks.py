"""Start ranks as forks of this process, which has imported what they need."""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.old_torch import train_fsdp2_on_cpus
from twa_scale.ranks.destroying import destroy_process_group


def run_on_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> None:
    """Call `function(*arguments)` on `size` ranks of a gloo group with a file rendezvous, as torchrun does.

    If a rank fails, the others are ended, and this program exits. Nothing before may start a thread.
    """
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        store = str(Path(directory) / "store")
        ranks = [fork.Process(target=_run, args=(rank, size, store, function, arguments)) for rank in range(size)]
        for process in ranks:
            process.start()
        running = list(ranks)
        while running:
            ended = wait([process.sentinel for process in running])
            for process in [process for process in running if process.sentinel in ended]:
                running.remove(process)
                process.join()
                if process.exitcode:
                    for other in running:
                        other.kill()
                    sys.exit(
                        f"{process.name} of {size} in {function.__name__}{arguments} ended with {process.exitcode}"
                    )


def _run(rank: int, size: int, store: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    train_fsdp2_on_cpus()
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {key: str(value) for key, value in variables.items()} | {"TORCHELASTIC_RUN_ID": "forked"}
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    function(*arguments)
    if dist.is_initialized():
        destroy_process_group()
