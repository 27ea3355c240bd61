"""Ranks of which one does not come; test_missing.py starts them."""

import os
import signal
import time
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh

from twa_scale.ranks import Group, World, limit_waiting

TIMEOUT = 3.0


def run(how: str, who: int, directory: Path) -> None:
    """Be one of these ranks: wait for rank `who`, or be it. What goes to stderr is in a file of `directory`."""
    world = World.from_environment()
    with (directory / f"stderr-{world.rank}").open("w") as file:
        os.dup2(file.fileno(), 2)
    with world.joined(torch.device("cpu"), directory, TIMEOUT):
        group = Group.world()
        mesh = init_device_mesh("cpu", (1, world.size), mesh_dim_names=("pods", "ranks"))
        limit_waiting(TIMEOUT)
        group.gather(0)
        if world.rank == who:
            match how:
                case "frozen":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "gone":
                    os._exit(9)
                case "busy":
                    time.sleep(60)
                case "failed":
                    raise RuntimeError("the data is not mounted on this node")
        # What a forward pass does, in a group that torch has made.
        torch.distributed.all_reduce(torch.ones(8), group=mesh.get_group("ranks"))
