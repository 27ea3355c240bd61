"""Evaluate sets of weights on a held-out split, alone or under torchrun: writes {directory: metrics} as JSON."""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from twa_scale.config import load_config
from twa_scale.ranks import Group, World, exit_process
from twa_scale.run.batches import make_batches
from twa_scale.run.evaluate import evaluate
from twa_scale.run.tasks import build_task


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
        group = Group.world()
        examples = task.dataset(arguments.split)
        batches = make_batches(examples, arguments.split, 64, None, group.rank, group.size, 0)
        model = task.model()
        results = {}
        for directory in arguments.weights:
            model.load_state_dict(load_file(directory / "model.safetensors"))
            results[str(directory)] = evaluate(task, model, batches, group, torch.device("cpu"), arguments.batches)
        if group.rank == 0:
            arguments.result.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
    exit_process(0)
