"""Ranks of which one does not come; test_missing.py starts them: `python -m tests.launch.missing HOW WHO DIRECTORY`."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh

from twa_scale.errors import TwaError
from twa_scale.ranks import Group, World, end, limit_waiting

TIMEOUT = 3.0


def run(how: str, who: int, directory: Path) -> None:
    world = World.from_environment()
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


if __name__ == "__main__":
    try:
        run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    except TwaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        end(2)
    except RuntimeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        end(1)
    end(0)
