"""Train with Lightning and Accelerate on two ranks: `-m tests.integrations.train_on_ranks DIRECTORY`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.forked_ranks import run_on_ranks
from tests.integrations import train_accelerate, train_lightning


def write(path: Path) -> None:
    """Write the results of all trainings to a directory."""
    for module in (train_lightning, train_accelerate):
        directory = path / module.__name__.rpartition("_")[2]
        for kind in module.KINDS:
            actual = module.results(kind, directory / kind)
            torch.save(actual, directory / f"{kind}-{dist.get_rank()}.pt")
    left = train_lightning.interrupted(
        "ddp", path / "interrupted"
    )  # the last case, because the ranks differ afterwards
    torch.save(left, path / f"interrupted-{dist.get_rank()}.pt")


if __name__ == "__main__":
    run_on_ranks(write, 2, Path(sys.argv[1]))
