"""The config-driven run: attach, train the coefficients, evaluate, save, export."""

import json
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from twa_scale.average.attach import attach
from twa_scale.average.average import TrainableAverage
from twa_scale.average.batchnorm import batchnorm_layers
from twa_scale.average.optimizer import check_optimizer
from twa_scale.average.state import STATE, RunState, save_state
from twa_scale.base.clock import Clock, read_bandwidth
from twa_scale.base.process_memory import peak_resident, return_freed_memory
from twa_scale.config import RunConfig, dump
from twa_scale.output import DirectoryLock, parse_size
from twa_scale.output.publish import check_target, output_errors, replace_file
from twa_scale.output.temporary import remove_leftovers
from twa_scale.ranks import Group, World, require_same_settings, set_collective_timeout
from twa_scale.run import comparison
from twa_scale.run.batches import Batches, make_batches
from twa_scale.run.best import BestAverage
from twa_scale.run.best_start import start_at_best
from twa_scale.run.engines import pod_mesh, run_engine
from twa_scale.run.evaluate import evaluate
from twa_scale.run.progress import Report
from twa_scale.run.records import Records, read_records
from twa_scale.run.resume import AVERAGE, SUMMARY, course, find_state, finished_summary, forget_state
from twa_scale.run.schedule import set_rates
from twa_scale.run.stopping import Stop, Stopped
from twa_scale.run.tasks import Task, build_task


def run(config: RunConfig, report: Report | None = None) -> dict[str, Any]:
    """Train the coefficients with the settings of `config`, on all ranks of the launcher. Collective.

    It writes into `config.output`: config.json, metrics.jsonl, tensorboard/, state.pt, average/ (the exported model),
    coefficients.png and summary.json.

    Args:
        config: the settings.
        report: the console output; by default, none.

    Returns:
        The summary of the run, as in summary.json.

    Raises:
        TwaError: settings, data or candidates are invalid; on every rank.
        Stopped: a rank received SIGUSR1 or SIGTERM; the state is saved, and the same call continues.
    """
    stop = Stop()
    world = World.from_environment()
    device = world.device(config.device)
    if device.type == "cpu":
        return_freed_memory()
    joined = world.joined(device, config.output, config.timeout)
    with stop.on_signals(), joined, DirectoryLock(Path(config.output)) as lock:
        return Run(config, world, device, report or Report(active=False), stop, lock).train()


class Run:
    """One run on one rank."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        device: torch.device,
        report: Report,
        stop: Stop | None = None,
        lock: DirectoryLock | None = None,
    ) -> None:
        self.config = config
        self.world = world
        self.device = device
        self.stop = stop or Stop()
        self.group = Group.world()
        self.report = report if self.group.rank == 0 else Report(active=False)
        self.output = Path(config.output)
        self.lock = lock or DirectoryLock(self.output)
        require_same_settings(self.group, config.model_dump(mode="json"))
        with self.group.agree():
            check_optimizer(config)
            self.task: Task = build_task(config.task)
            self.training = self._batches()
            self.held_out = replace(self.training, examples=self.task.dataset(config.evaluate_split))
            self.num_steps = config.steps or max(1, round(float(config.epochs or 0) * self.training.per_epoch))
            parse_size(config.max_shard_size)

    def train(self) -> dict[str, Any]:
        """Attach, continue from a saved state to the last step, then evaluate, export and return the summary.

        A finished run returns its summary and changes no file.
        """
        summary, state = self._found()
        if summary is not None:
            return summary
        self._attach(state)
        if caveat := comparison.caveat(self.config):
            self.report.say(caveat)
        return self._train()

    def _found(self) -> tuple[dict[str, Any] | None, RunState | None]:
        """Return the summary of a finished run, else the state to continue from. Collective.

        Only one rank reads the directory: a file system may differ between ranks. It locks the output directory.
        """
        found: tuple[dict[str, Any] | None, RunState | None] = (None, None)
        with self.group.agree():
            if self.group.rank == 0:
                found = self._find()
        return self.group.broadcast(found)

    def _find(self) -> tuple[dict[str, Any] | None, RunState | None]:
        config, say = self.config, self.report.say
        state = find_state(config, self.num_steps, say)
        if state and (summary := finished_summary(config, self.num_steps, state)):
            say(
                f"{self.output}: this run has finished its {state.step} steps; nothing was done. Give more steps to "
                "continue it, resume=false to start anew, or another output."
            )
            return summary, None
        with output_errors(self.output):
            self.output.mkdir(parents=True, exist_ok=True)
            check_target(self.output / AVERAGE, 0, overwrite=True)
        self.lock.take()
        remove_leftovers(self.output)
        return None, find_state(config, self.num_steps, say)  # again, under the lock

    def _attach(self, state: RunState | None) -> None:
        config, world, device = self.config, self.world, self.device
        self.engine = run_engine(config, world)
        mesh = pod_mesh(config, world, device)
        with self.group.agree():  # separate from the checks above: the constructor of DDP is collective
            self.model: nn.Module = self.engine.build(self.task, world, device, mesh and mesh["ranks"])
        set_collective_timeout(config.timeout)
        start = time.perf_counter()
        with self.report.bytes("reading candidates") as progress:
            replicas = None if mesh is None else mesh.get_group("pods")
            start_later = config.model_copy(update={"start": "center"}) if config.start == "best" else config
            self.twa: TrainableAverage = attach(
                self.model, config.candidates, start_later, replica_group=replicas, progress=progress
            )
        self._attach_seconds = time.perf_counter() - start
        if self.twa.rounding:
            self.report.say(str(self.twa.rounding))
        self.step = 0
        self.kept = BestAverage(self.task, config)
        self._stopping = False
        self._resume(state)
        with self.group.agree():
            if self.group.rank == 0:
                replace_file(self.output / "config.json", dump(self.config).encode())
            self.records = Records(self.output, active=self.group.rank == 0, step=self.step, say=self.report.say)
        self.clock = Clock(device)
        self.twa.clock.read()  # reset: attach is not a part of a step
        self._steps_here = 0

    def _train(self) -> dict[str, Any]:
        config = self.config
        self._leave_if_asked()  # a signal may have come while candidates were read
        if self.step == 0 and config.start == "best":
            start_at_best(self.twa, self.kept, self._measure, self.report.say)
        if self.step == 0 or self._evaluation_is_due():
            self._evaluate()
            self._leave_if_asked()
        with self.report.steps("training coefficients", self.num_steps, self.step) as advance:
            while self.step < self.num_steps:
                values = self._one_step()
                advance(values)
                if self.step % config.log_every == 0 or self.step == self.num_steps:
                    self.records.write(self.step, values)
                if self._stopping:
                    self._leave()
                if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                    self._save()
                if self._evaluation_is_due():
                    self._evaluate()
                    self._leave_if_asked()
        return self._finish()

    def _evaluation_is_due(self) -> bool:
        every = self.config.evaluate_every
        return every is not None and self.step % every == 0 and self.step < self.num_steps

    def _one_step(self) -> dict[str, float]:
        start = time.perf_counter()
        self._seed(self.step)
        self.model.train()
        sums = torch.zeros(
            2, dtype=torch.float64, device=self.device
        )  # the loss, and the number of ranks with a signal
        for i, batch in enumerate(self.training.training(self.step)):
            batch = {key: value.to(self.device) for key, value in batch.items()}
            with self.clock.part("forward+backward"):
                with self.engine.autocast(self.device):
                    loss = self.task.loss(self.model, batch) / self.training.num_micro
                self.engine.backward(self.model, loss)
            sums[0] += loss.detach()
            if self.engine.counts_micro_batches and i + 1 < self.training.num_micro:
                self.twa.step()  # for DeepSpeed: counts a micro-batch
        config = self.config
        rates = (config.optimizer.lr, config.row_lr)
        rate = set_rates(self.twa.optimizer, rates, config.schedule, self.step, self.num_steps)
        self.twa.step()
        self.twa.zero_grad()
        self.step += 1
        self._steps_here += 1
        sums[1] = float(self.stop.asked)
        loss_sum, asked = self.twa.pods.sum_(sums).tolist()
        self._stopping = asked > 0
        return {"loss": loss_sum / self.group.size, "lr": rate, "seconds": time.perf_counter() - start}

    def _seed(self, step: int) -> None:
        """Seed all generators from the seed, the step and the rank, so that a state needs no generator states."""
        seed = (self.config.seed * 1_000_003 + step) * 1_009 + self.group.rank
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def _evaluate(self) -> dict[str, float]:
        """Evaluate the average of this step on held-out data, record the metrics, and keep it if it is the best."""
        metrics = self._measure()
        values = comparison.with_split(self.config.evaluate_split, metrics)
        self.records.write(self.step, values)
        self.report.say(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        self.kept.update(self.step, metrics, self.twa)
        return metrics

    def _measure(self) -> dict[str, float]:
        """Return the metrics of the current weights, after recalibration of BatchNorm statistics."""
        self.twa.settle()  # the time of waiting for weights is measured in training steps only
        with self.engine.autocast(self.device):
            self._recalibrate()
            limit = self.config.evaluate_batches
            return evaluate(self.task, self.model, self.held_out, self.group, self.device, limit)

    def _recalibrate(self) -> None:
        if not batchnorm_layers(self.model):
            return
        limit = self.config.recalibrate_batches
        steps = range(min(limit, self.training.per_epoch))
        batches = (batch for step in steps for batch in self.training.training(step))
        self.twa.recalibrate_batchnorm(batches, forward=lambda model, batch: self.task.loss(model, batch))

    def _leave_if_asked(self) -> None:
        """Stop on all ranks if a rank has received a signal since the last step. Collective."""
        asked = torch.tensor(float(self.stop.asked), device=self.device)
        if self.twa.pods.sum_(asked).item() > 0:
            self._leave()

    def _leave(self) -> NoReturn:
        """Save the state and raise Stopped on all ranks. Collective."""
        self._save()
        self.records.close()
        self.twa.close()
        self.lock.release()
        text = f"stopped early at step {self.step} of {self.num_steps}, state saved in {self.output / STATE}"
        self.report.say(f"{text}; the same command continues")
        raise Stopped(text)

    def _finish(self) -> dict[str, Any]:
        trained = self._evaluate()
        state = self._save()
        costs = self._costs()  # before comparison and export, which are not steps
        measured = self._compare() | {comparison.TRAINED: trained}
        measured[comparison.EXPORTED] = self._take_kept(trained)
        start = time.perf_counter()
        with self.report.bytes("writing the average") as progress:
            limit = self.config.max_shard_size
            self.twa.export(self.output / AVERAGE, max_shard_size=limit, overwrite=True, progress=progress)
        summary = self._summary(measured) | costs | {"export_seconds": time.perf_counter() - start}
        rows = {name: a.norm(dim=0).numpy() for name, a in self.twa.row_corrections().items()}
        self.records.close()
        with self.group.agree():
            if self.group.rank == 0:
                self._write_results(summary, rows)
                save_state(self.output, {**state, "finished": True})
        self.report.finish(self.output, summary)
        self.twa.close()
        self.lock.release()
        return summary

    def _compare(self) -> comparison.Measured:
        """Return the metrics of the last candidate and the center. Collective."""
        if not self.config.compare:
            return {}
        self.report.say("comparing with the last candidate and the center: 2 more evaluations (compare: false: none)")
        measured = {}
        for name, which in ((comparison.LAST, "last"), (comparison.CENTER, "center")):
            with self.twa.weights(which):
                measured[name] = self._measure()
        return measured

    def _take_kept(self, trained: dict[str, float]) -> dict[str, float]:
        """Load the average to export into the model, and return its metrics. Collective."""
        best = self.kept.best
        if self.config.keep == "last" or best is None or best.step == self.step:
            return trained
        state = self.twa.state_dict()
        rows = state["rows"] and {**state["rows"], "values": best.row_values}
        kept = {"x": best.x, "coefficients": best.coefficients, "rows": rows, "buffers": best.buffers}
        self.twa.load_state_dict({**state, **kept})
        with self.engine.autocast(self.device):
            self._recalibrate()
        return dict(best.metrics)

    def _write_results(self, summary: dict[str, Any], rows: Mapping[str, npt.NDArray[Any]]) -> None:
        # Imported here, on one rank only: matplotlib is slow to import.
        from twa_scale.run.plots import plot_rows, plot_training

        plot_training(
            self.output / "coefficients.png",
            self.twa.coefficients.cpu().numpy(),
            [Path(label).name for label in self.twa.fingerprint.labels],
            list(self.twa.layout.groups),
            read_records(self.output),
        )
        if rows:
            plot_rows(self.output / "rows.png", rows)
        replace_file(self.output / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())

    def _summary(self, measured: comparison.Measured) -> dict[str, Any]:
        """Return the summary of the run."""
        split, keep, best = self.config.evaluate_split, self.config.keep, self.kept.best
        return {
            "steps": self.step,
            "ranks": self.group.size,
            "evaluation": comparison.with_split(split, measured[comparison.EXPORTED]),
            "exported_step": best.step if best and keep == "best" else self.step,
            "exported_as": comparison.exported_as(self.kept, split, keep, self.step),
            "comparison": {name: comparison.with_split(split, metrics) for name, metrics in measured.items()},
            "verdict": comparison.verdict(self.kept, split, measured) if self.config.compare else None,
        }

    def _costs(self) -> dict[str, Any]:
        """Return the mean cost of a step of this process: seconds, and bytes moved in memory. Collective."""
        steps = self._steps_here
        seconds = {part: total / max(steps, 1) for part, total in self.clock.read().items()}
        cost = self.twa.cost(steps)
        within = cost["project"]["seconds_in_backward"] + cost["combine"]["seconds_in_forward"]
        return {
            "bytes_read_per_rank": self.group.gather(self.twa.bytes_read),
            "store_bytes_per_rank": self.group.gather(self.twa.store_bytes),
            "rounding": self.twa.rounding and asdict(self.twa.rounding),
            "peak_resident_bytes_per_rank": self.group.gather(peak_resident()),
            "attach_seconds": self._attach_seconds,
            "forward_backward_seconds": seconds.get("forward+backward", 0.0) - within,
            "cost": cost,
            "read_bandwidth": read_bandwidth(self.device),
        }

    def _save(self) -> dict[str, Any]:
        best = self.kept.best
        state = {
            "twa": self.twa.state_dict(),
            "keep": self.config.keep,
            "kept": best and best.model_dump(),
            "step": self.step,
            "finished": False,
            "course": course(self.config, self.num_steps),
            "candidates": [str(Path(label).resolve()) for label in self.twa.fingerprint.labels],
        }
        with self.group.agree():
            if self.group.rank == 0:
                save_state(self.output, state)
        return state

    def _resume(self, state: RunState | None) -> None:
        if state is None:
            with self.group.agree():
                if self.group.rank == 0:
                    forget_state(self.output)
            return
        self.twa.load_state_dict(state.twa.model_dump())
        self.step = state.step
        if not self.kept.restore(state.kept):
            self.report.say("the evaluation data has changed: the best average of earlier evaluations is discarded")
        before = state.course["steps"]
        raised = f", which were {before}: the learning rate follows the schedule of {self.num_steps}"
        self.report.say(
            f"continuing from step {self.step} of {self.num_steps}{raised if before != self.num_steps else ''}"
        )

    def _batches(self) -> Batches:
        config, group = self.config, self.group
        examples = self.task.dataset(config.split)
        return make_batches(
            examples, config.split, config.batch_size, config.micro_batch_size, group.rank, group.size, config.seed
        )
