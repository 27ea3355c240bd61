"""`twa-scale search`: choose an average of the candidates by a metric of the task, without training."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import Any, get_args

from twa_scale.average.search import Evaluation, search
from twa_scale.average.search.methods import Constraint, Method
from twa_scale.base.names import nearest
from twa_scale.config import RunConfig
from twa_scale.errors import ConfigError, OutputError
from twa_scale.output import DirectoryLock
from twa_scale.output.publish import check_target, output_errors, replace_file
from twa_scale.output.temporary import remove_leftovers
from twa_scale.ranks import World, require_same_settings
from twa_scale.run.attached import AttachedRun
from twa_scale.run.own_files import require_candidates_outside
from twa_scale.run.progress import Report
from twa_scale.run.resume import AVERAGE, SUMMARY, read_object, with_known_lr
from twa_scale.run.stopping import Stop, Stopped

DIRECTORY = "search"
"""The directory in `output` of a run with the results of its searches."""


@dataclass(frozen=True)
class SearchOptions:
    """The options of a search."""

    methods: Sequence[str] = ("sweep",)
    """The methods, which run one after another. Each starts from the best average of the earlier ones."""
    budget: int = 200
    """The maximum number of averages that each method evaluates."""
    metric: str | None = None
    """A metric of the task; by default, its main metric."""
    higher_is_better: bool | None = None
    """Whether higher values are better. By default, as for the task's main metric, and False for `loss`."""
    constraint: Constraint = "sum"
    """The constraint of `cma`, as for `twa_scale.search`."""


def run_search(config: RunConfig, options: SearchOptions, report: Report | None = None) -> dict[str, Any]:
    """Search averages by a metric on `evaluate_split`, and export the best, on all ranks of the launcher. Collective.

    It writes into `output`/search: the scores of all averages (scores-*.jsonl), from which the same search continues,
    average/ (the best) and summary.json.

    Returns:
        The summary, as in summary.json.

    Raises:
        TwaError: settings, data or candidates are invalid; on every rank.
        Stopped: a rank received SIGUSR1 or SIGTERM; the same call continues.
    """
    stop = Stop()
    world = World.from_environment()
    device = world.device(config.device)
    output = Path(config.output) / DIRECTORY
    joined = world.joined(device, str(output), config.timeout)
    with stop.on_signals(), joined, DirectoryLock(output) as lock:
        run = AttachedRun(config, world, device, report or Report(active=False), stop)
        require_same_settings(run.group, vars(options))
        return _Search(run, options, output, lock).run()


class _Search:
    """One search on one rank."""

    def __init__(self, run: AttachedRun, options: SearchOptions, output: Path, lock: DirectoryLock) -> None:
        self._run = run
        self._options = options
        self._output = output
        self._lock = lock
        self._metric = options.metric or run.kept.metric
        with run.group.agree():
            self._methods = [_method(name) for name in options.methods]
            self._higher = self._direction()
        self._record = output / f"scores-{self._digest()}.jsonl"
        self._tried: list[Evaluation] = []
        self._measured = 0
        self._best: Evaluation | None = None

    def run(self) -> dict[str, Any]:
        """Evaluate the averages, export the best one, and return the summary. Collective."""
        run, config = self._run, self._run.config
        with run.group.agree():
            if run.group.rank == 0:
                self._prepare()
        run.attach(with_known_lr(config, None))
        if config.evaluate_split == "test":
            run.report.log("the search chooses by the test split, so its results on it are biased")
        if config.start == "best":
            run.start_at_best()
        start = time.perf_counter()
        for method in self._methods:
            self._search(method)
            self._take_best()
        seconds = time.perf_counter() - start
        run.recalibrate()
        with run.report.bytes("writing the average") as progress:
            limit = config.max_shard_size
            run.twa.export(self._output / AVERAGE, max_shard_size=limit, overwrite=True, progress=progress)
        summary = self._summary(seconds)
        with run.group.agree():
            if run.group.rank == 0:
                replace_file(self._output / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
        run.twa.close()
        self._lock.release()
        return summary

    def _prepare(self) -> None:
        """Create and lock the directory, and remove scores of a search that is not to be continued. On one rank."""
        with output_errors(self._output):
            self._require_own_summary()
            require_candidates_outside(self._output, self._run.config)
            self._output.mkdir(parents=True, exist_ok=True)
            check_target(self._output / AVERAGE, 0, overwrite=True)
        self._lock.take()
        remove_leftovers(self._output)
        if not self._run.config.resume:
            with output_errors(self._record):
                self._record.unlink(missing_ok=True)

    def _require_own_summary(self) -> None:
        """Check that an earlier search has written the summary that this one replaces.

        Raises:
            OutputError: it has not.
        """
        path = self._output / SUMMARY
        known = read_object(path) or {}
        if os.path.lexists(path) and not known.keys() >= {"methods", "metric"}:
            raise OutputError(f"{path}: was not written by a search, which would replace it. Choose another `output`.")

    def _search(self, method: Method) -> None:
        options = self._options
        search(
            self._run.twa,
            self._score,
            method,
            budget=options.budget,
            higher_is_better=self._higher,
            constraint=options.constraint,
            seed=self._run.config.seed,
            record=self._record,
            tried=self._note,
        )

    def _take_best(self) -> None:
        """Set the average to the best one of all methods so far, not only of the last method. Collective."""
        assert self._best is not None  # `search` raises an error if no score is finite
        self._run.twa.start_from(self._best.coefficients)

    def _score(self) -> float:
        metrics = self._run.measure()
        self._measured += 1
        if self._metric not in metrics:
            raise ConfigError(
                f"metric: {self._metric!r} is not a metric of the task, which has {', '.join(sorted(metrics))}."
            )
        return metrics[self._metric]

    def _note(self, evaluation: Evaluation) -> None:
        """Record an evaluation, report it if it is the best, and stop if a rank has received a signal. Collective."""
        run = self._run
        self._tried.append(evaluation)
        if self._is_better(evaluation):
            self._best = evaluation
            text = f"{evaluation.label}: {self._name} {evaluation.score:.6g}, the best so far"
            run.report.log(f"{len(self._tried)}: {text}")
        if run.asked_to_stop():
            text = f"stopped early after {len(self._tried)} averages, their scores are in {self._record}"
            run.report.log(f"{text}; the same command continues")
            raise Stopped(text)

    def _is_better(self, evaluation: Evaluation) -> bool:
        if not isfinite(evaluation.score) or self._best is None:
            return isfinite(evaluation.score)
        best = self._best.score
        return evaluation.score > best if self._higher else evaluation.score < best

    def _direction(self) -> bool:
        """Return whether higher values of the metric are better.

        Raises:
            ConfigError: the metric is neither the main metric of the task nor the loss, and no option gives the
                direction.
        """
        if self._options.higher_is_better is not None:
            return self._options.higher_is_better
        if self._metric == self._run.kept.metric:
            return self._run.kept.higher
        if self._metric == "loss":
            return False
        raise ConfigError(
            f"metric: {self._metric!r} is not the main metric of the task, {self._run.kept.metric!r}: give "
            "--higher-is-better or --lower-is-better."
        )

    @property
    def _name(self) -> str:
        return f"{self._run.config.evaluate_split}/{self._metric}"

    def _digest(self) -> str:
        """Return a digest of the settings on which the scores depend. The record checks the content of the candidates.

        Searches of other data, metrics or candidates therefore have other files.
        """
        keys = {"candidates", "select", "groups", "task", "precision", "split", "seed", "batch_size", "store", "coding"}
        keys |= {"evaluate_split", "evaluate_batches", "recalibrate_batches", "micro_batch_size", "center", "buffers"}
        settings = self._run.config.model_dump(mode="json", include=keys)
        return sha256(json.dumps([self._metric, settings], sort_keys=True).encode()).hexdigest()[:8]

    def _summary(self, seconds: float) -> dict[str, Any]:
        assert self._best is not None
        tried = [
            {"label": evaluation.label, "score": evaluation.score}
            for evaluation in self._tried
            if isfinite(evaluation.score)
        ]
        return {
            "metric": self._name,
            "higher_is_better": self._higher,
            "methods": self._methods,
            "ranks": self._run.group.size,
            "num_candidates": self._run.twa.num_candidates,
            "best": {
                "label": self._best.label,
                "score": self._best.score,
                "coefficients": self._best.coefficients.tolist(),
            },
            "tried": sorted(tried, key=lambda evaluation: evaluation["score"], reverse=self._higher),
            "not_finite": len(self._tried) - len(tried),
            "measured": self._measured,
            "seconds": seconds,
        }


def _method(name: str) -> Method:
    """Return the method of a name.

    Raises:
        ConfigError: the name is unknown.
    """
    for method in get_args(Method):
        if name == method:
            result: Method = method
            return result
    known = get_args(Method)
    raise ConfigError(f"--method: {name!r} is unknown{nearest(name, known) or '.'} Use {', '.join(known)}.")


def rows(summary: Mapping[str, Any], count: int = 10) -> list[tuple[str, float]]:
    """Return the best averages of a search, with the last candidate and the mean of all candidates, best first."""
    fixed = {"lawa:1": "last candidate", f"lawa:{summary['num_candidates']}": "mean of all"}
    labeled = [
        (entry["label"], fixed.get(entry["label"], entry["label"]), entry["score"]) for entry in summary["tried"]
    ]
    return [(text, score) for i, (label, text, score) in enumerate(labeled) if i < count or label in fixed]
