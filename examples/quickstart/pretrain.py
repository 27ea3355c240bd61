"""Train the small byte-level GPT under FSDP2 and leave behind what the quickstart compares.

Start it with torchrun. One constant-rate run writes candidates while it trains; exponential moving averages follow it;
and, branched off at 80 % of the budget, a run whose rate decays to zero uses the same number of steps as the constant
run and TWA together. All three see the same batches.
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import track

from twa_scale import Snapshots
from twa_scale.config import load_config
from twa_scale.ranks import World, exit_process

sys.path.insert(0, str(Path(__file__).parents[2]))
from examples.training import Training

EMA_DECAYS = (0.9, 0.95, 0.98, 0.99)


def main() -> None:
    """Run all three trainings and write runs/quickstart-style candidates, ema-* and decayed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True, help="steps of the constant run")
    parser.add_argument(
        "--budget", type=int, required=True, help="steps of the decayed run: constant run and TWA together"
    )
    parser.add_argument("--candidates", type=int, required=True)
    parser.add_argument("--every", type=int, required=True, help="steps between two candidates")
    parser.add_argument("--lr", type=float, default=2e-3)
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    world = World.from_environment()
    warnings.filterwarnings("ignore", "DTensor random operators")  # each rank draws its own rows: all that is needed
    with world.joined(torch.device("cpu")):
        pretrain(Training(config, world, arguments.steps, arguments.lr), arguments)


def pretrain(training: Training, arguments: argparse.Namespace) -> None:
    """Constant run with candidates and moving averages; then the decayed branch."""
    steps, budget = arguments.steps, arguments.budget
    branch = round(0.8 * budget)
    first = steps - (arguments.candidates - 1) * arguments.every
    snapshots = Snapshots(arguments.out / "candidates", every_n_steps=arguments.every, start_step=first)
    weights = list(training.model.parameters())
    averages = {decay: [p.detach().clone() for p in weights] for decay in EMA_DECAYS}
    at_branch: dict[str, Any] = {}
    losses: list[float] = []
    start = time.perf_counter()
    rank = dist.get_rank()
    for step in track(range(steps), "constant rate", disable=rank != 0):
        if step == branch:
            at_branch = training.state()
        losses.append(training.update(step, 1.0))
        for decay, average in averages.items():
            part = (1 - decay) / (1 - decay ** (step + 1))  # without the pull to the random start
            torch._foreach_lerp_(average, weights, part)
        snapshots.step(training.model, step + 1)
    seconds = (time.perf_counter() - start) / steps
    last = training.state()
    writer = Snapshots(arguments.out / "baselines", every_n_steps=1)
    for decay, average in averages.items():
        with torch.no_grad():
            for parameter, value in zip(weights, average, strict=True):
                parameter.copy_(value)
        name_it(writer.save(training.model, 1), f"ema-{decay}")
    training.restore(at_branch if at_branch else last)
    training.decay(branch, budget)
    name_it(writer.save(training.model, 1), "decayed")
    if rank == 0:
        facts = {
            "parameters": sum(p.numel() for p in weights),
            "steps": steps,
            "budget": budget,
            "branch": branch,
            "candidates": arguments.candidates,
            "every": arguments.every,
            "seconds_per_step": seconds,
            "losses": losses[::10],
        }
        (arguments.out / "pretrain.json").write_text(json.dumps(facts) + "\n")


def name_it(path: Path, name: str) -> None:
    """Give a snapshot the name of its method."""
    if dist.get_rank() == 0:
        path.rename(path.with_name(name))
    dist.barrier()


if __name__ == "__main__":
    main()
    exit_process(0)
