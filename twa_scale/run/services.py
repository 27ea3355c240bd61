"""Services that a run reports to: Weights & Biases and MLflow. Rank 0 only."""

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from typing_extensions import assert_never

from twa_scale.base.inputs import parse_json, read_bounded
from twa_scale.config import RunConfig, flattened
from twa_scale.config.kinds import LoggerName, ServiceName
from twa_scale.errors import ConfigError, StateError
from twa_scale.output.publish import replace_file

PROJECT = "twa_scale"
"""The project of Weights & Biases and the experiment of MLflow, unless the environment names another."""
IDS = "loggers.json"
"""The file with the ids of the runs in the services, which a run needs to continue them."""
_HINTS: dict[ServiceName, str] = {
    "wandb": "`wandb login`, or WANDB_MODE=offline",
    "mlflow": "MLFLOW_TRACKING_URI",
}
_MAX_PARAMS, _MAX_PARAM_LENGTH = 100, 500  # the limits of MLflow: parameters in a request, and characters in a value


def is_ids(content: Mapping[str, Any] | None) -> bool:
    """Return whether the content of a file is that of `IDS`: the identifiers of runs, by service."""
    return content is not None and content.keys() <= _HINTS.keys()


class Service(ABC):
    """One run in a service. Each package raises its own errors."""

    id: str
    """The id with which the service continues the run."""

    @abstractmethod
    def write(self, line: Mapping[str, Any]) -> None:
        """Send the metrics of one step."""

    @abstractmethod
    def close(self, *, finished: bool) -> None:
        """End the run. A run that is not finished may be continued."""


class Services:
    """The services of a run. A service that fails during the run is reported and no longer used.

    Args:
        log: called with one line of text.
    """

    def __init__(self, log: Callable[[str], object]) -> None:
        self._log = log
        self._open: dict[ServiceName, Service] = {}

    def begin(self, config: RunConfig, *, resumed: bool) -> None:
        """Start the runs of `report_to`, or continue them. Call this before long work, because a service may refuse.

        Args:
            config: the settings. The output directory exists.
            resumed: whether the run continues.

        Raises:
            ConfigError: a service refuses the run. No service is open afterwards.
        """
        directory = Path(config.output)
        known = _ids(directory) if resumed else {}
        for name in dict.fromkeys(config.report_to):
            if name == "tensorboard" or name == "csv":
                continue
            try:
                self._open[name] = _begun(name, config, known.get(name))
            except Exception as error:
                self.close(finished=False)
                raise ConfigError(
                    f"report_to: {name} could not begin a run: {_first_line(error)}. Check its settings in "
                    f"the environment ({_HINTS[name]}), or leave {name} out of report_to."
                ) from error
        if self._open:
            ids = {name: service.id for name, service in self._open.items()}
            replace_file(directory / IDS, (json.dumps({**known, **ids}) + "\n").encode())

    def write(self, line: Mapping[str, Any]) -> None:
        """Send the step and the metrics of one line."""
        for name, service in list(self._open.items()):
            try:
                service.write(line)
            except Exception as error:
                del self._open[name]
                self._log(
                    f"report_to: {name} failed at step {line['step']}: {_first_line(error)}. The run "
                    "continues without it; metrics.jsonl has all metrics."
                )

    def close(self, *, finished: bool) -> None:
        """End the runs. A second call does nothing."""
        while self._open:
            name, service = self._open.popitem()
            try:
                service.close(finished=finished)
            except Exception as error:
                self._log(f"report_to: {name} could not end its run: {_first_line(error)}.")


def _first_line(error: Exception) -> str:
    """Return the message of an error of a package on one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def require_packages(names: Sequence[LoggerName]) -> None:
    """Check that the packages of services are installed.

    Raises:
        ConfigError: names one that is missing.
    """
    for name in names:
        # A folder of this name, such as the one that wandb writes into the working directory, has no origin.
        if name in _HINTS and ((spec := find_spec(name)) is None or spec.origin is None):
            raise ConfigError(
                f"report_to: the package {name} is not installed. Install it (pip install {name}), or leave {name} "
                "out of report_to."
            )


def _begun(name: ServiceName, config: RunConfig, known: str | None) -> Service:
    match name:
        case "wandb":
            return _Wandb(config, known)
        case "mlflow":
            return _Mlflow(config, known)
        case _:
            assert_never(name)


class _Wandb(Service):
    """A run of Weights & Biases. Its axis is a metric `step`, so that a resumed run may repeat steps."""

    def __init__(self, config: RunConfig, known: str | None) -> None:
        import wandb

        output = Path(config.output)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", output.resolve().name),
            dir=str(output),
            id=known or os.environ.get("WANDB_RUN_ID"),
            resume="allow",
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off"),
        )
        self.id = str(self._run.id)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, line: Mapping[str, Any]) -> None:
        self._run.log(dict(line))

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class _Mlflow(Service):
    """A run of MLflow. Its client does not change the active run of the process."""

    def __init__(self, config: RunConfig, known: str | None) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        if known is not None:
            self.id = known
            self._client.set_terminated(known, "RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self.id = str(self._client.create_run(number, run_name=Path(config.output).resolve().name).info.run_id)
        self._log_settings(config)

    def write(self, line: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        milliseconds, step = int(time.time() * 1000), line["step"]
        metrics = [Metric(key, float(value), milliseconds, step) for key, value in line.items() if key != "step"]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")

    def _log_settings(self, config: RunConfig) -> None:
        from mlflow.entities import Param

        settings = list(flattened(config.model_dump(mode="json")))
        for start in range(0, len(settings), _MAX_PARAMS):
            part = settings[start : start + _MAX_PARAMS]
            self._client.log_batch(self.id, params=[Param(key, str(value)[:_MAX_PARAM_LENGTH]) for key, value in part])


def _ids(directory: Path) -> dict[str, str]:
    """Return the ids of earlier runs; none if the file is missing or damaged, so that new runs start."""
    try:
        ids = parse_json(read_bounded(directory / IDS, 1 << 16, StateError))
    except (StateError, ValueError):
        return {}
    return {str(name): str(known) for name, known in ids.items()} if isinstance(ids, dict) else {}
