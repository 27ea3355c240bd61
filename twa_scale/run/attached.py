"""The model, the average and the data of a configuration, on one rank."""

import random
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from twa_scale.average.attach import attach_at_least
from twa_scale.average.average import TrainableAverage
from twa_scale.average.batchnorm import batchnorm_layers
from twa_scale.average.optimizer import check_optimizer
from twa_scale.base.clock import Clock
from twa_scale.base.names import nearest
from twa_scale.config import RunConfig
from twa_scale.errors import ConfigError, TwaError
from twa_scale.output import parse_size
from twa_scale.ranks import Group, World, require_same_settings, set_collective_timeout
from twa_scale.run.batches import Batches, divide_batch, make_batches
from twa_scale.run.best import BestAverage
from twa_scale.run.best_start import start_at_best
from twa_scale.run.engines import pod_mesh, run_engine
from twa_scale.run.evaluate import evaluate
from twa_scale.run.progress import Report
from twa_scale.run.schedule import set_rates
from twa_scale.run.shares import with_divisors
from twa_scale.run.stopping import Stop
from twa_scale.run.tasks import SPLITS, Examples, Task, build_task


class AttachedRun:
    """A task and its data; after `attach`, also the model and the average. It takes steps and evaluates.

    Args:
        config: the settings.
        world: all ranks.
        device: the device of this rank.
        report: the console output.
        stop: whether this process has received a signal.
        trains: whether to use training data, for steps or for BatchNorm statistics.

    Raises:
        ConfigError: settings or data are invalid; on every rank.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        device: torch.device,
        report: Report,
        stop: Stop | None = None,
        *,
        trains: bool = True,
    ) -> None:
        self.config = config
        self.world = world
        self.device = device
        self.stop = stop or Stop()
        self.stopping = False
        """Whether a rank had received a signal at the last step; the same on all ranks."""
        self.group = Group.world()
        self.report = report if self.group.rank == 0 else Report(active=False)
        self.output = Path(config.output)
        require_same_settings(self.group, config.model_dump(mode="json"))
        with self.group.agree():
            check_optimizer(config)
            self.task: Task = build_task(config.task)
            if trains:
                per_epoch = self.training.per_epoch
                self.num_steps = config.steps or max(1, round(float(config.epochs or 0) * per_epoch))
            held_out = self._examples(config.evaluate_split)  # may be less than a batch
            micro, _ = divide_batch(config.batch_size, config.micro_batch_size, self.group.size)
            self.held_out = Batches(held_out, config.batch_size, micro, self.group.rank, self.group.size, config.seed)
            parse_size(config.max_shard_size)
            self.kept = BestAverage(self.task, config)

    @cached_property
    def training(self) -> Batches:
        """The batches of the training split."""
        config, group = self.config, self.group
        examples = self._examples(config.split)
        return make_batches(
            examples, config.split, config.batch_size, config.micro_batch_size, group.rank, group.size, config.seed
        )

    def _examples(self, split: str) -> Examples:
        """Return the examples of a split.

        Raises:
            ConfigError: the task does not know the split.
        """
        try:
            return self.task.dataset(split)
        except (KeyError, ValueError) as error:
            if split in SPLITS or isinstance(error, TwaError):
                raise
            hint = nearest(split, SPLITS) or "."
            raise ConfigError(
                f"split {split!r}: dataset() of the task raised {type(error).__name__}: {error}{hint}"
            ) from error

    def attach(self, config: RunConfig, minimum: int = 2) -> None:
        """Build the model and read the candidates, at least `minimum`. Collective.

        With `start: best`, call `start_at_best` afterwards.
        """
        config = config.model_copy(update={"start": "center"}) if config.start == "best" else config
        self.engine = run_engine(config, self.world)
        mesh = pod_mesh(config, self.world, self.device)
        with self.group.agree():  # separate from the checks above: the constructor of DDP is collective
            self.model: nn.Module = self.engine.build(self.task, self.world, self.device, mesh and mesh["ranks"])
        set_collective_timeout(config.timeout)
        replicas = None if mesh is None else mesh.get_group("pods")
        start = time.perf_counter()
        with self.report.bytes("reading candidates") as progress:
            self.twa: TrainableAverage = attach_at_least(
                minimum, self.model, config.candidates, config, replica_group=replicas, progress=progress
            )
        self.attach_seconds = time.perf_counter() - start
        if self.twa.rounding:
            self.report.log(str(self.twa.rounding))
        self.clock = Clock(self.device)

    def start_at_best(self) -> dict[str, float]:
        """Start at the best of the averages that need no training, and return its metrics. Collective."""
        num_batches = self.held_out.num_in_order(self.config.evaluate_batches)

        def measure(every: int) -> dict[str, float]:
            return self.measure(every=every)

        return start_at_best(self.twa, self.kept, measure, num_batches, self.report.log)

    def asked_to_stop(self) -> bool:
        """Return whether a rank has received a signal. Collective."""
        asked = torch.tensor(float(self.stop.asked), device=self.device)
        return self.twa.pods.sum_(asked).item() > 0

    def reset_clocks(self) -> None:
        """Reset the measured times, so that the cost of a step does not include earlier work."""
        self.clock.read()
        self.twa.clock.read()

    def take_step(self, step: int, position: int) -> dict[str, float]:
        """Take a step of the coefficients, and return its values. Collective.

        Args:
            step: the step whose batches and seed are used.
            position: the step whose rate in the schedule of the run is used.
        """
        start = time.perf_counter()
        self._seed(step)
        self.model.train()
        # The loss, and the number of ranks with a signal.
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        batches, num_micro = self.training.training(step), self.training.num_micro
        divided = with_divisors(batches, self.task, num_micro, self.group, self.device)
        for i, (batch, divisor) in enumerate(divided):
            batch = {key: value.to(self.device) for key, value in batch.items()}
            with self.clock.part("forward+backward"):
                with self.engine.autocast(self.device):
                    loss = self.task.loss(self.model, batch) / divisor
                self.engine.backward(self.model, loss)
            sums[0] += loss.detach()
            if self.engine.counts_micro_batches and i + 1 < num_micro:
                self.twa.step()  # counts a micro-batch of DeepSpeed
        rates = (self.twa.config.lr, self.twa.config.row_lr)
        rate = set_rates(self.twa.optimizer, rates, self.config.schedule, position, self.num_steps)
        self.twa.step()
        self.twa.zero_grad()
        sums[1] = float(self.stop.asked)
        loss_sum, asked = self.twa.pods.sum_(sums).tolist()
        self.stopping = asked > 0
        return {"loss": loss_sum / self.group.size, "lr": rate, "seconds": time.perf_counter() - start}

    def measure(self, *, recalibrate: bool = True, every: int = 1) -> dict[str, float]:
        """Return the metrics of the current weights, after recalibration of BatchNorm statistics. Collective.

        They are computed on each `every`-th batch of the evaluation.
        """
        self.twa.write_deferred()  # so that only training steps measure the time of waiting for weights
        if recalibrate:
            self.recalibrate()
        with self.engine.autocast(self.device):
            limit = self.config.evaluate_batches
            return evaluate(self.task, self.model, self.held_out, self.group, self.device, limit, every)

    def recalibrate(self) -> None:
        """Compute the BatchNorm statistics of the current weights, if the model has them. Collective."""
        if not batchnorm_layers(self.model):
            return
        limit = self.config.recalibrate_batches
        steps = range(min(limit, self.training.per_epoch))
        batches = (batch for step in steps for batch in self.training.training(step))
        with self.engine.autocast(self.device):
            self.twa.recalibrate_batchnorm(batches, forward=lambda model, batch: self.task.loss(model, batch))

    def _seed(self, step: int) -> None:
        """Seed all generators from the seed, the step and the rank, so that a state needs no generator states."""
        seed = (self.config.seed * 1_000_003 + step) * 1_009 + self.group.rank
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
