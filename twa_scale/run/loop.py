"""The config-driven run: attach, train the coefficients, evaluate, save, export."""

import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from twa_scale.average.coefficients import Which
from twa_scale.average.measures import DISTANCE
from twa_scale.average.state import (
    STATE,
    RateState,
    RunState,
    forget_state,
    keep_loaded,
    remove_unused_rows,
    save_state,
)
from twa_scale.base.process_memory import return_freed_memory
from twa_scale.base.urls import absolute
from twa_scale.config import RunConfig, dump, recipe_line
from twa_scale.output import DirectoryLock
from twa_scale.output.publish import check_target, output_errors, replace_file
from twa_scale.output.temporary import remove_leftovers
from twa_scale.ranks import Group, World
from twa_scale.run import comparison
from twa_scale.run.attached import AttachedRun
from twa_scale.run.own_files import CONFIG, require_candidates_outside, require_own_files
from twa_scale.run.progress import Report
from twa_scale.run.rate_search import InterruptedSearch, search_rate
from twa_scale.run.records import Records
from twa_scale.run.results import are_due, costs, of_average, write_results
from twa_scale.run.resume import (
    AVERAGE,
    course,
    find_state,
    finished_summary,
    with_known_lr,
)
from twa_scale.run.services import Services, require_packages
from twa_scale.run.stopping import Stop, Stopped

_FIRST = 10  # steps whose mean loss is compared with that on held-out data


def run(config: RunConfig, report: Report | None = None) -> dict[str, Any]:
    """Train the coefficients with the settings of `config`, on all ranks of the launcher. Collective.

    It writes into `config.output`: config.json, metrics.jsonl, tensorboard/, state.pt and its rows, average/ (the
    exported model), coefficients.png and summary.json.

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


class Run(AttachedRun):
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
        with Group.world().agree():
            require_packages(config.report_to)
        super().__init__(config, world, device, report, stop)
        self.lock = lock or DirectoryLock(self.output)
        self.services = Services(self.report.log)

    def train(self) -> dict[str, Any]:
        """Attach, continue from a saved state to the last step, then evaluate, export and return the summary.

        A finished run returns its summary and changes no file.
        """
        summary, state = self._find_on_first_rank()
        if summary is not None:
            return summary
        with self.group.agree():
            if self.group.rank == 0:
                self.services.begin(self.config, resumed=state is not None)
        try:
            self._attach(state)
            if line := recipe_line(self.config):
                self.report.log(line)
            if caveat := comparison.caveat(self.config):
                self.report.log(caveat)
            return self._train()
        finally:
            self.services.close(finished=False)  # a finished run has closed them

    def _find_on_first_rank(self) -> tuple[dict[str, Any] | None, RunState | None]:
        """Return the summary of a finished run, else the state to continue from. Collective.

        Only one rank reads and locks the output directory, because ranks may see different files.
        """
        result: tuple[dict[str, Any] | None, RunState | None] = (None, None)
        with self.group.agree():
            if self.group.rank == 0:
                result = self._find()
        return self.group.broadcast(result)

    def _find(self) -> tuple[dict[str, Any] | None, RunState | None]:
        config, log = self.config, self.report.log
        state = find_state(config, self.num_steps, log, rows="size")
        if state and (summary := finished_summary(config, self.num_steps, state)):
            log(
                f"{self.output}: this run has finished its {state.step} steps; nothing was done. Give more steps to "
                "continue it, resume=false to start again, or another output."
            )
            return summary, None
        with output_errors(self.output):
            require_own_files(self.output)
            require_candidates_outside(self.output, config)
            self.output.mkdir(parents=True, exist_ok=True)
            check_target(self.output / AVERAGE, 0, overwrite=True)
        self.lock.take()
        remove_leftovers(self.output)
        remove_unused_rows(self.output)
        return None, find_state(config, self.num_steps, log)  # read again while the lock is held

    def _attach(self, state: RunState | None) -> None:
        config = with_known_lr(self.config, state)
        self.attach(config)
        self.step = self._steps_here = 0
        self._first_losses: list[float] = []
        self.rate: RateState | None = None
        self._resume(state)
        with self.group.agree():
            if self.group.rank == 0:
                replace_file(self.output / CONFIG, dump(self.config).encode())
            self.records = Records(
                self.output,
                active=self.group.rank == 0,
                step=self.step,
                log=self.report.log,
                report_to=config.report_to,
                services=self.services,
            )

    def _train(self) -> dict[str, Any]:
        config = self.config
        self._leave_if_asked()  # a signal may have arrived while candidates were read
        at_start = self._choose_start() if self.step == 0 and self.rate is None else None
        if self.step == 0 or self._evaluation_is_due():
            self._evaluate(at_start)
            self._leave_if_asked()
        self.reset_clocks()  # the start, trials of rates and a loaded state also write weights
        with self.report.steps("training coefficients", self.num_steps, self.step) as advance:
            while self.step < self.num_steps:
                values = self.take_step(self.step, self.step)
                self.step += 1
                self._steps_here += 1
                advance(values)
                if self.step <= _FIRST:
                    self._first_losses.append(values["loss"])
                if self.step % config.log_every == 0 or self.step == self.num_steps:
                    due = are_due(self.step, self.num_steps, config.log_every)
                    self.records.write(self.step, values | (self.twa.described() if due else {}))
                if self.stopping:
                    self._leave()
                if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                    self._save()
                if self._evaluation_is_due():
                    self._evaluate()
                    self._leave_if_asked()
        return self._finish()

    def _choose_start(self) -> dict[str, float] | None:
        """Choose the start and the learning rate on held-out data, if the settings ask for it. Collective.

        Returns:
            The metrics of the start, if they are known.
        """
        metrics = None
        if self.config.start == "best":
            metrics = self.start_at_best()
            self._leave_if_asked()
        if self.config.optimizer.lr == "auto":
            try:
                self.rate = search_rate(self)
            except InterruptedSearch:
                self._leave()
            if self.config.checkpoint_every:
                self._save()  # so that a run that is killed does not search again
        return metrics

    def _evaluation_is_due(self) -> bool:
        every = self.config.evaluate_every
        return every is not None and self.step % every == 0 and self.step < self.num_steps

    def _evaluate(self, known: dict[str, float] | None = None) -> dict[str, float]:
        """Evaluate the average of this step on held-out data, record the metrics, and keep it if it is the best.

        `known` are its metrics, if it has been evaluated already. Collective.
        """
        if known is None:
            metrics = self.measure()
        else:
            metrics = known
            self.recalibrate()
        values = comparison.with_split(self.config.evaluate_split, metrics)
        self.records.write(self.step, {**values, DISTANCE: self.twa.distance(), **self.twa.described()})
        self.report.log(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        self.kept.update(self.step, metrics, self.twa)
        return metrics

    def _leave_if_asked(self) -> None:
        """Stop on all ranks if a rank has received a signal since the last step. Collective."""
        if self.asked_to_stop():
            self._leave()

    def _leave(self) -> NoReturn:
        """Save the state and raise Stopped on all ranks. Collective."""
        self._save()
        self.records.close(finished=False)
        self.twa.close()
        self.lock.release()
        text = f"stopped early at step {self.step} of {self.num_steps}, state saved in {self.output / STATE}"
        self.report.log(f"{text}; the same command continues")
        raise Stopped(text)

    def _finish(self) -> dict[str, Any]:
        trained = self._evaluate()
        state = self._save()
        costs = self._costs()  # before comparison and export, which are not steps
        measured = self._compare() | {comparison.TRAINED: trained}
        measured[comparison.EXPORTED] = self._load_kept(trained)
        start = time.perf_counter()
        with self.report.bytes("writing the average") as progress:
            limit = self.config.max_shard_size
            self.twa.export(self.output / AVERAGE, max_shard_size=limit, overwrite=True, progress=progress)
        summary = self._summary(measured) | costs | {"export_seconds": time.perf_counter() - start}
        rows = {name: norms.numpy() for name, norms in self.twa.row_norms().items()}
        self.records.close()
        with self.group.agree():
            if self.group.rank == 0:
                write_results(self.output, self.twa, summary, rows)
                save_state(self.output, {**state, "finished": True})
        self.report.finish(self.output, summary)
        self.twa.close()
        self.lock.release()
        return summary

    def _compare(self) -> comparison.Measured:
        """Return the metrics of the last candidate and the center, or of the best candidate. Collective."""
        if not self.config.compare:
            return {}
        n = self.twa.num_candidates
        indices = range(n) if self.config.compare == "candidates" else range(n - 1, n)
        description = "every candidate" if len(indices) == n else "the last candidate"
        self.report.log(
            f"comparing with {description} and the center: {len(indices) + 1} more evaluations (compare: false: none)"
        )
        results = {which: self._measure_shown(which) for which in (*indices, "center")}
        measured = {comparison.LAST: results[n - 1], comparison.CENTER: results["center"]}
        if len(indices) == n:
            best = indices[0]
            for i in indices:
                best = i if self.kept.better(results[i], results[best]) else best
            self.report.log(f"the best candidate is {self.twa.fingerprint.labels[best]}")
            measured = {comparison.BEST: results[best], **measured}
        return measured

    def _measure_shown(self, which: Which) -> dict[str, float]:
        with self.twa.weights(which):
            return self.measure()

    def _load_kept(self, trained: dict[str, float]) -> dict[str, float]:
        """Load the average to export into the model, and return its metrics. Collective."""
        best = self.kept.best
        if self.config.keep == "last" or best is None or best.step == self.step:
            return trained
        assert self.kept.values is not None
        self.twa.set_values(self.kept.values)
        self.recalibrate()
        return dict(best.metrics)

    def _summary(self, measured: comparison.Measured) -> dict[str, Any]:
        """Return the summary of the run. Collective."""
        split, keep, best = self.config.evaluate_split, self.config.keep, self.kept.best
        return {
            "steps": self.step,
            "ranks": self.group.size,
            "evaluation": comparison.with_split(split, measured[comparison.EXPORTED]),
            "rate": self.rate and self.rate.model_dump(),
            "exported_step": best.step if best and keep == "best" else self.step,
            "exported_from": best.name if best and keep == "best" else f"step {self.step}",
            "exported_as": comparison.exported_as(self.kept, split, keep, self.step),
            "comparison": {name: comparison.with_split(split, metrics) for name, metrics in measured.items()},
            "evaluated_on": comparison.evaluated_on(self.config),
            "verdict": comparison.verdict(self.kept, split, measured) if self.config.compare else None,
            "advice": comparison.advice(self.kept, self.config, self.step, self._training_loss()),
            **of_average(self.twa),
        }

    def _training_loss(self) -> float | None:
        """Return the mean loss of the first steps, if this process has taken them."""
        losses = self._first_losses
        return sum(losses) / len(losses) if len(losses) == min(_FIRST, self.step) else None

    def _costs(self) -> dict[str, Any]:
        """Return the mean cost of a step of this process. Collective."""
        context = self.twa, self.group, self.device
        seconds = self.clock.read().get("forward+backward", 0.0) / max(self._steps_here, 1)
        return {"attach_seconds": self.attach_seconds, **costs(*context, self._steps_here, seconds)}

    def _save(self) -> dict[str, Any]:
        best = self.kept.best
        state = {
            "twa": self.twa.state_dict(self.output, best=self.kept.values),
            "keep": self.config.keep,
            "kept": best and best.model_dump(),
            "rate": self.rate and self.rate.model_dump(),
            "step": self.step,
            "finished": False,
            "course": course(self.config, self.num_steps),
            "candidates": [absolute(label) for label in self.twa.fingerprint.labels],
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
        self.twa.load_state_dict(state.twa.model_dump(), self.output)
        self.step, self.rate = state.step, state.rate
        usable = self.kept.restore(state, self.twa, self.output)
        with self.group.agree():
            if self.group.rank == 0:
                keep_loaded(self.output, state)
        if not usable:
            self.report.log("the evaluation data has changed: the best average of earlier evaluations is discarded")
        before = state.course["steps"]
        raised = f", which were {before}: the learning rate follows the schedule of {self.num_steps}"
        self.report.log(
            f"continuing from step {self.step} of {self.num_steps}{raised if before != self.num_steps else ''}"
        )
        if self.config.optimizer.lr == "auto" and (self.step or self.rate):
            self.report.log(f"optimizer.lr: {self.twa.config.lr:g}, that of the saved state; rates are not tried again")
