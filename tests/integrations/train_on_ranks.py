"""Train with Lightning and with Accelerate: `-m tests.integrations.train_on_ranks DIRECTORY`, under torchrun."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.integrations import train_accelerate, train_lightning

if __name__ == "__main__":
    for module in (train_lightning, train_accelerate):
        directory = Path(sys.argv[1]) / module.__name__.rpartition("_")[2]
        for kind in module.KINDS:
            found = module.results(kind, directory / kind)
            torch.save(found, directory / f"{kind}-{dist.get_rank()}.pt")
    left = train_lightning.interrupted("ddp", Path(sys.argv[1]) / "interrupted")  # last: the ranks no longer agree
    torch.save(left, Path(sys.argv[1]) / f"interrupted-{dist.get_rank()}.pt")
    dist.destroy_process_group()
