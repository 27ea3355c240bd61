"""Ranks, one of which does not join a collective. test_missing.py starts them."""

import os
import signal
import time
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh

from twa_scale.ranks import Group, World, set_collective_timeout

TIMEOUT = 3.0


def run(mode: str, failed_rank: int, directory: Path) -> None:
    """Run one rank. Rank `failed_rank` freezes, ends, sleeps or fails. Write stderr and the time."""
    world = World.from_environment()
    with (directory / f"stderr-{world.rank}").open("w") as file:
        os.dup2(file.fileno(), 2)
    with world.joined(torch.device("cpu"), directory, TIMEOUT):
        group = Group.world()
        mesh = init_device_mesh("cpu", (1, world.size), mesh_dim_names=("pods", "ranks"))
        set_collective_timeout(TIMEOUT)
        group.gather(0)
        if world.rank == failed_rank:
            match mode:
                case "frozen":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "gone":
                    os._exit(9)
                case "busy":
                    time.sleep(60)
                case "failed":
                    raise RuntimeError("the data is not mounted on this node")
        # A collective of a forward pass, in a group that torch has made.
        torch.distributed.all_reduce(torch.ones(8), group=mesh.get_group("ranks"))
