"""Reports of a run besides metrics.jsonl: CSV, and services whose packages are installed."""

import csv
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.limits import files_up_to
from twa_scale import ConfigError
from twa_scale.config import RunConfig, validated
from twa_scale.ranks import World
from twa_scale.run.csv_file import CSV
from twa_scale.run.loop import Run
from twa_scale.run.progress import Report
from twa_scale.run.records import METRICS, Records, read_records
from twa_scale.run.services import IDS, Services


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / CSV).open(newline="") as file:
        return list(csv.DictReader(file))


def records(directory: Path, step: int = 0, **options: Any) -> Records:
    return Records(directory, active=True, step=step, log=print, report_to=["csv"], **options)


def settings(output: Path, *names: str) -> RunConfig:
    task = {"name": "tests.commands.small_runs:half_a_task"}
    inputs = {"candidates": "none", "output": str(output), "task": task, "steps": 1}
    return validated(RunConfig, inputs | {"report_to": list(names)})


def test_csv_has_a_column_for_each_metric(tmp_path: Path) -> None:
    first = records(tmp_path)
    first.write(0, {"validation/loss": 1.5})
    first.write(1, {"loss": 0.1, "lr": 0.25})
    first.write(2, {"loss": float("nan"), "lr": 0.5})
    first.close()
    assert rows(tmp_path) == [
        {"step": "0", "validation/loss": "1.5", "loss": "", "lr": ""},
        {"step": "1", "validation/loss": "", "loss": "0.1", "lr": "0.25"},
        {"step": "2", "validation/loss": "", "loss": "nan", "lr": "0.5"},
    ]
    second = records(tmp_path, step=1)
    second.write(2, {"loss": 3.0, "lr": 0.75})
    assert [row["loss"] for row in rows(tmp_path)] == ["", "0.1", "3.0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [CSV, METRICS]


def test_csv_on_a_full_disk(tmp_path: Path) -> None:
    messages: list[str] = []
    file = Records(tmp_path, active=True, step=0, log=messages.append, report_to=["csv"])
    file.write(1, {"loss": 0.5})
    with files_up_to(12):
        file.write(2, {"loss": 0.25})
        file.write(3, {"loss": 0.25, "lr": 1.0})  # a new column
        file.write(4, {"loss": 0.125, "lr": 1.0})
    file.write(5, {"loss": 1.0, "lr": 1.0})
    file.close()
    assert [line["step"] for line in read_records(tmp_path)] == [1, 2, 3, 4, 5]
    assert [(row["step"], row["lr"]) for row in rows(tmp_path)] == [
        ("1", ""), ("2", ""), ("3", "1.0"), ("4", "1.0"), ("5", "1.0"),
    ]  # fmt: skip
    assert sum(CSV in text for text in messages) in (1, 2) and all("The run continues" in text for text in messages)


def test_names_in_the_configuration(tmp_path: Path) -> None:
    assert settings(tmp_path).report_to == []
    inputs = {"candidates": "x", "output": "y", "task": {"name": "causal_lm"}, "steps": 1}
    assert validated(RunConfig, inputs).report_to == ["tensorboard"]
    assert validated(RunConfig, inputs | {"report_to": "csv"}).report_to == ["csv"]
    with pytest.raises(ConfigError, match=r"report_to.*'wandb'"):
        validated(RunConfig, inputs | {"report_to": ["neptune"]})


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_missing_is_named_first(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is raised before data are read, also if a folder of the working directory has its name."""
    if (spec := find_spec(name)) is not None and spec.origin is not None:
        pytest.skip(f"{name} is installed")
    (tmp_path / name).mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=f"report_to: the package {name} is not installed.*pip install {name}"):
        Run(settings(tmp_path / "out", name), World(0, 1, 0), torch.device("cpu"), Report(active=False))
    assert not (tmp_path / "out").exists()


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    messages: list[str] = []
    config = settings(tmp_path / "out", "mlflow")
    for resumed in (False, True):
        services = Services(messages.append)
        (tmp_path / "out").mkdir(exist_ok=True)
        services.begin(config, resumed=resumed)
        lines = records(tmp_path / "out", step=resumed, services=services)
        lines.write(1 + resumed, {"loss": 0.5, "coefficients/0": -1.0})
        lines.close(finished=resumed)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("twa_scale").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["optimizer.name"] == "adamw"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(1, 0.5), (2, 0.5)]
    services = Services(messages.append)
    services.begin(config, resumed=True)
    shutil.rmtree(tmp_path / "store")
    for step in (3, 4):
        services.write({"step": step, "loss": 0.5})
    services.close(finished=True)
    assert len(messages) == 1 and "mlflow failed at step 3" in messages[0]
    with pytest.raises(ConfigError, match="mlflow could not begin a run"):
        services.begin(config, resumed=True)


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for resumed in (False, True, False):
        services = Services(print)
        (tmp_path / "out").mkdir(exist_ok=True)
        services.begin(settings(tmp_path / "out", "wandb"), resumed=resumed)
        services.write({"step": 1, "loss": 0.5})
        services.close(finished=True)
        ids.append(json.loads((tmp_path / "out" / IDS).read_text())["wandb"])
    assert ids[0] == ids[1] != ids[2]  # a run that starts again has a new id
    assert len(list((tmp_path / "out/wandb").glob(f"offline-run-*-{ids[0]}/*.wandb"))) == 2
