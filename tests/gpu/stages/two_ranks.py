"""Training with two processes on one GPU: over NCCL if possible, otherwise over gloo with tensors on the GPU."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from tempfile import mkdtemp

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.gpu.stages.setup import Row, Setup
from tests.gpu.stages.sharded import compared, reference
from twa_scale.ranks import exit_process

RANKS = 2
TIMEOUT = timedelta(seconds=30)


def run(setup: Setup) -> Iterator[Row]:
    folder = Path(mkdtemp(dir=setup.scratch))
    rows = folder / "rows"
    rows.touch()
    arguments = (str(setup.device), str(folder))
    ranks = mp.start_processes(rank_of, arguments, RANKS, join=False, start_method="spawn")
    assert ranks is not None
    ended, failure = False, None
    with rows.open() as file:
        while not ended:  # rows are printed at once, because a rank may hang later
            try:
                ended = ranks.join(timeout=1)
            except Exception as error:  # of a rank
                ended, failure = True, error
            yield from (Row(**json.loads(line)) for line in file)
    if failure:
        raise failure


def rank_of(rank: int, device_name: str, folder_name: str) -> None:
    """Run one rank. Rank 0 writes rows as they are measured."""
    torch.set_num_threads(1)
    device, folder = torch.device(device_name), Path(folder_name)
    expected = reference(folder)
    backend, reason = connected(rank, device, folder)
    rows = [Row("backend of two ranks on one device", backend, reason)]
    with (folder / "rows").open("a") if rank == 0 else open("/dev/null", "a") as file:  # noqa: PTH123
        for row in (*rows, *compared(device, folder, expected)):
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
    dist.destroy_process_group()
    exit_process(0)  # threads of gloo may abort an interpreter that is being finalized


def connected(rank: int, device: torch.device, folder: Path) -> tuple[str, str]:
    """Create the process group. Return its backend, and the reason if it is not NCCL."""

    def join(backend: str) -> None:
        store = dist.FileStore(str(folder / backend.replace(":", "-")), RANKS)
        dist.init_process_group(backend, store=store, rank=rank, world_size=RANKS, timeout=TIMEOUT)

    if device.type == "cpu":
        join("gloo")
        return "gloo", "no GPU"
    torch.cuda.set_device(device)
    join("cpu:gloo,cuda:nccl")
    try:
        dist.all_reduce(torch.ones(1, device=device))
        torch.cuda.synchronize()
        return "nccl", ""
    except dist.DistBackendError as error:
        dist.destroy_process_group()
        join("gloo")
        return "gloo", str(error).strip().splitlines()[-1][:150]
