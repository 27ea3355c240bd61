"""Evaluate sets of weights on a held-out split, alone or under torchrun: writes {directory: metrics} as JSON."""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from twa_scale.config import load_config
from twa_scale.ranks import Group, World, exit_process
from twa_scale.run.batches import make_batches
from twa_scale.run.evaluate import evaluate
from twa_scale.run.tasks import Task, build_task


def main() -> None:
    """Evaluate each directory on the chosen split."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, as for `twa-scale run`")
    parser.add_argument("--split", required=True)
    parser.add_argument("--batches", type=int, help="batches of a rank; the whole split when not given")
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--weights", type=Path, nargs="+", required=True, help="directories with model.safetensors")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    task = build_task(config.task)
    world = World.from_environment()
    with world.joined(torch.device("cpu")):
        model = task.model()
        results = {}
        for directory in arguments.weights:
            model.load_state_dict(load_file(directory / "model.safetensors"))
            results[str(directory)] = evaluated(task, model, arguments.split, arguments.batches)
        if world.rank == 0:
            arguments.result.write_text(json.dumps(results, indent=2) + "\n")


def evaluated(task: Task, model: nn.Module, split: str, batches: int | None) -> dict[str, float]:
    """Return the metrics of the weights in the model on the first `batches` of a split for each rank. Collective."""
    group = Group.world()
    data = make_batches(task.dataset(split), split, 64, None, group.rank, group.size, 0)
    return evaluate(task, model, data, group, torch.device("cpu"), batches)


if __name__ == "__main__":
    main()
    exit_process(0)
