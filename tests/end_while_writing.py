"""End two ranks while a snapshot is written: `python -m tests.end_while_writing DIRECTORY`. Tests start it.

Prints a line `MODE:CODES` with the exit codes of the ranks for each way to end.
"""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from tests import models
from tests.ranks.test_snapshots_asynchronous import block_writes
from twa_scale.output import background
from twa_scale.output.snapshots import Snapshots


def run(rank: int, mode: str, directory: Path) -> None:
    background._WAIT_SECONDS = 1.0
    store = dist.FileStore(str(directory / f".{mode}"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = models.wrap(models.build(0, (1,)), "fsdp2")
    (directory / mode).mkdir(exist_ok=True)
    with block_writes():
        Snapshots(directory / mode, every_n_steps=1, asynchronous=True).step(model, 1)
        dist.barrier()
        if mode == f"kill-{rank}":
            os.kill(os.getpid(), signal.SIGKILL)
        dist.destroy_process_group()
    # the thread starts to write only now, when the program ends


def main() -> None:
    fork = multiprocessing.get_context("fork")
    modes = {}
    for mode in ("leave", "kill-0", "kill-1"):
        modes[mode] = [fork.Process(target=run, args=(rank, mode, Path(sys.argv[1]))) for rank in range(2)]
        for process in modes[mode]:
            process.start()
    for mode, processes in modes.items():
        for process in processes:
            process.join()
        print(f"{mode}:{','.join(str(process.exitcode) for process in processes)}")


if __name__ == "__main__":
    main()
