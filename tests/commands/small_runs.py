"""Test data: small real data sets, candidates from real training, a custom task, and functions that start a run."""

import os
import sysconfig
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tests.digits import load_digits
from tests.sums import weighted
from twa_scale import Snapshots
from twa_scale.average.state import load_state
from twa_scale.config import RunConfig, TaskConfig, validated
from twa_scale.run import results, run
from twa_scale.run.tasks import Task, build_task, stack
from twa_scale.run.tasks.task import SPLITS

STDLIB = Path(sysconfig.get_path("stdlib"))
TEXT = {
    "name": "causal_lm",
    "model": {"byte_gpt": {"n_layer": 2, "n_head": 2, "d_model": 32}},
    "text": {"train": [str(STDLIB / "argparse.py")], "validation": [str(STDLIB / "textwrap.py")]},
    "context": 32,
}
N = 3


class Tensors:
    """Examples that are rows of tensors in memory."""

    def __init__(self, **tensors: Tensor) -> None:
        self._tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self._tensors.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self._tensors.items()}


class Scores:
    """A custom task: the mean of a small regression on the digits. It can raise an error at a given call."""

    def __init__(self, die_at: int = 0, broken_rank: int = -1) -> None:
        if broken_rank == int(os.environ.get("RANK", "0")):
            raise RuntimeError("the data is not mounted on this node")
        self._losses_left = die_at

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 7), nn.Tanh(), nn.Dropout(0.0), nn.Linear(7, 1))

    def dataset(self, split: str) -> Tensors:
        images, labels = load_digits()
        part = slice(SPLITS.index(split), None, 30)
        values = torch.from_numpy(images[part]).float() / 16
        return Tensors(x=values, y=torch.from_numpy(labels[part]).float() / 9)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if self._losses_left:
            self._losses_left -= 1
            if not self._losses_left:
                raise RuntimeError("the machine is gone")
        return F.mse_loss(model(batch["x"])[:, 0], batch["y"])

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
        return {"loss": (F.mse_loss(model(batch["x"])[:, 0], batch["y"], reduction="sum"), len(batch["y"]))}


def scores(die_at: int = 0, broken_rank: int = -1) -> Scores:
    """Return the task. A configuration names the import path of this function; `die_at` counts calls of the loss."""
    return Scores(die_at, broken_rank)


def half_a_task() -> object:
    return nn.Linear(2, 2)


def convnet(width: int = 4) -> nn.Module:
    """Return a network with two convolutions and BatchNorm for 8 x 8 digits."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * width, 10),
    )


def numbered_convnet() -> nn.Module:
    """Return the same network with a parameter and a buffer of integers, which averaging does not change."""
    net = convnet()
    net.register_parameter("classes", nn.Parameter(torch.arange(10), requires_grad=False))
    return net


SCORES = {"name": "tests.commands.small_runs:scores"}


def digits(path: Path) -> dict[str, Any]:
    """Write the digits and return the task section."""
    images, labels = load_digits()
    images = (images * 15.9).astype(np.uint8).reshape(-1, 1, 8, 8)
    parts = {"train": slice(0, 480), "validation": slice(480, 640)}
    arrays = {f"{s}_images": images[part] for s, part in parts.items()} | {
        f"{s}_labels": labels[indices] for s, indices in parts.items()
    }
    np.savez(path, **arrays)
    return {"name": "image_classification", "model": "tests.commands.small_runs:convnet", "data": str(path)}


def train_candidates(
    task: Mapping[str, Any], directory: Path, steps: int = 40, every: int = 10, lr: float = 3e-3, **options: Any
) -> str:
    """Train from scratch, write the last N candidates to `directory`, and return their pattern."""
    torch.manual_seed(0)
    made: Task = build_task(validated(TaskConfig, dict(task)))
    model, data = made.model(), made.dataset("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    snapshots = Snapshots(directory, every_n_steps=every, keep_last=N, **options)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        indices = torch.randint(len(data), (16,), generator=generator).tolist()
        optimizer.zero_grad()
        made.loss(model.train(), stack([data[i] for i in indices])).backward()
        optimizer.step()
        snapshots.step(model, step)
    return str(directory / "step-*")


def settings(candidates: str, task: Mapping[str, Any], output: Path, **changes: Any) -> dict[str, Any]:
    """Return the settings of a run of 4 steps."""
    usual = {"steps": 4, "batch_size": 12, "groups": "tensor", "optimizer": {"name": "adamw", "lr": 0.1}}
    return {
        "candidates": candidates,
        "task": dict(task),
        "output": str(output),
        "evaluate_batches": 2,
        **usual,
    } | changes


def run_here(data: Mapping[str, Any], pictures: bool = False) -> dict[str, Any]:
    """Run `twa-scale run` without a shell, on one rank or on this rank of a pool.

    Drawing takes most of the time of so small a run, so pictures are left out unless a test looks at them.
    """
    with nullcontext() if pictures else patch.object(results, "_draw_pictures"):
        return as_launched(lambda: run(validated(RunConfig, dict(data))))


def as_launched(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Call a function with the environment that a launcher gives to this rank of a pool, or to one rank."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    launcher = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    with patch.dict(os.environ, launcher):
        return call()


def load(directory: Path) -> dict[str, Tensor]:
    """Load all tensors of an output with any number of files."""
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def state_of(output: Path) -> dict[str, Any]:
    return load_state(output).model_dump()


def by_hand(candidates: str, output: Path) -> dict[str, Tensor]:
    """Return sum_i a_i w_i in float64 with the coefficients that the run reports, for trained tensors."""
    twa = load_state(output).exported.model_dump()
    pattern = Path(candidates)
    states = [load(path) for path in sorted(pattern.parent.glob(pattern.name))]
    return {
        name: weighted(twa["coefficients"][:, group], (state[name].double() for state in states))
        for name, group in twa["group_of"].items()
    }
