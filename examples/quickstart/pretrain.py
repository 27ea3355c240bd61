"""Train the small byte-level GPT under FSDP2 and leave behind what the quickstart compares.

Start it with torchrun. One constant-rate run writes candidates while it trains; exponential moving averages follow it;
and, branched off at 80 % of the budget, a run whose rate decays to zero uses the same number of steps as the constant
run and TWA together. All three see the same batches.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import track
from torch import nn

from twa_scale import Snapshots
from twa_scale.config import RunConfig, load_config
from twa_scale.ranks import World, exit_process
from twa_scale.run.batches import make_batches
from twa_scale.run.engines import run_engine
from twa_scale.run.tasks import build_task

EMA_DECAYS = (0.9, 0.95, 0.98, 0.99)


class Training:
    """A model, its AdamW and its averages: what one optimizer step needs."""

    def __init__(self, config: RunConfig, world: World, steps: int, lr: float) -> None:
        self.task = build_task(config.task)
        self.model = run_engine(config, world).build(self.task, world, torch.device("cpu"))
        torch.manual_seed(config.seed)
        self.model.init_weights()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
        self.batches = make_batches(
            self.task.dataset("train"), "train", config.batch_size, None, world.rank, world.size, config.seed + 1
        )
        self.lr, self.warmup = lr, steps // 20

    def update(self, step: int, factor: float) -> float:
        """Take optimizer step `step` (from 0) with the rate times `factor`; return this rank's loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor * min(1.0, (step + 1) / self.warmup)
        (batch,) = self.batches.training(step)
        loss = self.task.loss(self.model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def state(self) -> list[torch.Tensor]:
        """Return a copy of this rank's shards of the weights and of AdamW's moments."""
        return [tensor.detach().clone() for tensor in self._tensors()]

    def restore(self, state: list[torch.Tensor]) -> None:
        """Go back to `state`."""
        with torch.no_grad():
            for tensor, saved in zip(self._tensors(), state, strict=True):
                tensor.copy_(saved)

    def _tensors(self) -> list[torch.Tensor]:
        moments = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        return [*self.model.parameters(), *moments]


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
    at_branch: list[torch.Tensor] = []
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
    for step in track(range(branch, budget), "decayed rate", disable=rank != 0):
        training.update(step, (budget - step) / (budget - branch))
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
