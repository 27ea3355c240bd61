"""Train the small byte-level GPT under FSDP2, average its weights on the way, and learn the averaging coefficients.

Start it with torchrun. `train_and_average` is what a user of the package writes; the rest are other methods of the same
number of steps, which see the same batches. The weights of each method are written to a directory of its own.
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
from rich.console import Console
from rich.progress import track
from torch.optim.lr_scheduler import CosineAnnealingLR

from twa_scale import RunningAverages, Snapshots
from twa_scale.config import load_config
from twa_scale.ranks import Group, World, exit_process
from twa_scale.run.batches import make_batches
from twa_scale.run.evaluate import evaluate

sys.path.insert(0, str(Path(__file__).parents[2]))
from examples.training import Training

EMA = [0.9, 0.95, 0.98, 0.99]


def main() -> None:
    """Run all trainings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True, help="steps at a constant rate")
    parser.add_argument("--extra", type=int, required=True, help="steps of TWA, and of the annealing after it")
    parser.add_argument("--keep", type=int, required=True, help="candidates, the last of which is at the end")
    parser.add_argument("--every", type=int, required=True, help="steps between two candidates")
    parser.add_argument("--batches", type=int, required=True, help="batches of the validation split for a choice")
    parser.add_argument("--lr", type=float, default=2e-3)
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    world = World.from_environment()
    warnings.filterwarnings("ignore", "DTensor random operators")  # each rank draws its own rows: all that is needed
    with world.joined(world.device(config.device)):
        training = Training(config, world, arguments.steps, arguments.lr)
        Quickstart(training, arguments).run()


class Quickstart:
    """The trainings on one rank."""

    def __init__(self, training: Training, arguments: argparse.Namespace) -> None:
        self.training = training
        self.model = training.model
        self.arguments = arguments
        self.rank = Group.world().rank  # a single process has no process group
        self.console = Console(quiet=self.rank != 0)
        self.writer = Snapshots(arguments.out / "methods", every_n_steps=1)
        self.end = arguments.steps + 2 * arguments.extra  # of every method
        self.branch = min(arguments.steps, round(0.8 * self.end))
        self.states: dict[int, dict[str, Any]] = {}
        """The weights and the optimizer at `branch` and at the end of the constant rate."""

    def run(self) -> None:
        """Make the weights of all methods."""
        steps, extra = self.arguments.steps, self.arguments.extra
        self.train_and_average()
        self.console.print(f"others: {2 * extra} more steps with a falling rate, and a run of {self.end} steps")
        self.training.restore(self.states[steps])
        self.training.decay(steps, self.end)
        self.write("annealed")
        self.training.restore(self.states[self.branch])
        self.training.decay(self.branch, self.end)
        self.write("decayed")

    def train_and_average(self) -> None:
        """Train at a constant rate with running averages, learn their coefficients, and train on at a low rate."""
        arguments, model = self.arguments, self.model
        window = {"every": arguments.every, "keep": arguments.keep, "store": "dense32"}  # by default 1 bit an element
        averages = RunningAverages(model, ema=EMA, window=window)
        self.constant_rate(averages)
        self.write("last")
        averages.save(arguments.out / "candidates")  # only for `twa-scale run`, which starts from files

        scores = averages.compare(self.score, [*averages.names, "lawa:4", "lawa:8"])
        self.console.print(f"validation loss of the averages:\n{scores}", highlight=False)
        ema = min((name for name in scores if name.startswith("ema")), key=scores.__getitem__)
        for name, method in ((ema, "ema"), ("mean", "uniform")):
            with averages.weights(name):
                self.write(method)

        start = min((name for name in scores if not name.startswith("ema")), key=scores.__getitem__)
        with averages.learning({"groups": "tensor+row", "optimizer": {"name": "adamw", "lr": 0.03}}) as twa:
            twa.start_from(start)
            schedule = CosineAnnealingLR(twa.optimizer, arguments.extra)
            for step in track(range(arguments.extra), f"TWA from {start}", disable=self.rank != 0):
                self.training.backward(arguments.steps + step)
                twa.step()
                twa.zero_grad()
                schedule.step()
            self.write("twa")
            learned = self.training.state()["model"]
        model.load_state_dict(learned)
        self.training.decay(arguments.steps + arguments.extra, self.end, 0.5)
        self.write("twa-annealed")

    def constant_rate(self, averages: RunningAverages) -> None:
        """Train, and keep the states that others start from."""
        losses: list[float] = []
        steps, start = self.arguments.steps, time.perf_counter()
        for step in track(range(steps), "constant rate", disable=self.rank != 0):
            if step == self.branch:
                self.states[step] = self.training.state()
            losses.append(self.training.update(step, 1.0))
            averages.step()
        self.states[steps] = self.training.state()
        seconds = (time.perf_counter() - start) / steps
        facts = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            **{key: getattr(self.arguments, key) for key in ("steps", "extra", "keep", "every")},
            "seconds_per_step": seconds,
            "losses": losses[::10],
        }
        if self.rank == 0:
            (self.arguments.out / "training.json").write_text(json.dumps(facts) + "\n")

    def score(self, model: torch.nn.Module) -> float:
        """Return the loss on the validation split."""
        group, task = Group.world(), self.training.task
        batches = make_batches(task.dataset("validation"), "validation", 32, None, group.rank, group.size, 0)
        return evaluate(task, model, batches, group, self.training.device, self.arguments.batches)["loss"]

    def write(self, method: str) -> None:
        """Write the weights in the model to the directory of a method."""
        path = self.writer.save(self.model, 1)
        if self.rank == 0:
            path.rename(path.with_name(method))
        if dist.is_initialized():
            dist.barrier()


if __name__ == "__main__":
    main()
    exit_process(0)
