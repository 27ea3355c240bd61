"""Runs under DeepSpeed: one JSON file, DeepSpeed's launcher, every stage, and states that other engines continue."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from tests import zero
from tests.commands.conftest import TrainedCandidates
from tests.commands.small_runs import by_hand, load, run_here, state_of
from tests.pool import Pool
from twa_scale.config import RunConfig, load_config, validated
from twa_scale.errors import ConfigError
from twa_scale.run.engines.zero import zero_settings

ROOT = Path(__file__).resolve().parents[2]
STEPS = {"steps": 4, "batch_size": 8, "micro_batch_size": 1, "evaluate_batches": 2, "groups": "block"}


def settings(text: TrainedCandidates, output: Path, **more: Any) -> dict[str, Any]:
    return {"candidates": text.candidates, "task": text.task, "output": str(output), **STEPS, **more}


def close(weights: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert weights.keys() == want.keys()
    for name, value in want.items():
        assert (weights[name].double() - value.double()).norm() <= 1e-5 * value.double().norm(), name


def run_all(runs: list[dict[str, Any]]) -> None:
    zero.forget_groups()
    for data in runs:
        run_here(data)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_zero_stage_has_the_result_of_fsdp2(
    ranks: Pool, text: TrainedCandidates, tmp_path: Path, precision: str
) -> None:
    engines = ("fsdp2", "zero1", "zero2", "zero3")
    runs = [settings(text, tmp_path / engine, engine=engine, precision=precision) for engine in engines]
    ranks(run_all, 2, timeout=400, runs=runs)
    expected = load(tmp_path / "fsdp2" / "average")
    for engine in ("zero1", "zero2", "zero3"):
        weights = load(tmp_path / engine / "average")
        if precision == "float32":
            close(weights, expected)
        for name, value in by_hand(text.candidates, tmp_path / engine).items():
            assert (weights[name].double() - value).norm() <= 1e-5 * value.norm(), name
        metrics = [json.loads((tmp_path / e / "summary.json").read_text())["evaluation"] for e in ("fsdp2", engine)]
        for name, value in metrics[0].items():
            assert metrics[1][name] == pytest.approx(value, rel=1e-5 if precision == "float32" else 2e-2)


def write_json(path: Path, twa: dict[str, Any]) -> Path:
    """Settings of ordinary training may remain in the file."""
    ordinary = {
        "optimizer": {"type": "Adam", "params": {"lr": 1e-4}},
        "scheduler": {"type": "WarmupLR", "params": {}},
        "train_batch_size": "auto",
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
    }
    path.write_text(json.dumps({"twa": twa, **ordinary}))
    return path


def test_arguments_of_the_deepspeed_launcher_are_ignored(text: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    path = write_json(tmp_path / "ds.json", settings(text, tmp_path / "run"))
    words = ("run", "--print-config", "--deepspeed", "--deepspeed_config", path, "steps=2")
    result = shell("--local_rank=1", *words)
    config = validated(RunConfig, yaml.safe_load(result.out))
    assert result.code == 0 and config.steps == 2 and config.engine == "zero3" and config.candidates == text.candidates


@pytest.mark.slow
def test_one_json_under_the_launcher_of_deepspeed(text: TrainedCandidates, tmp_path: Path) -> None:
    path = write_json(tmp_path / "ds.json", settings(text, tmp_path / "run"))
    command = ["launch/deepspeed.sh", "--deepspeed", "--deepspeed_config", str(path), "steps=2"]
    variables = {"PYTHON": sys.executable, "NPROC": "2", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["ranks"] == 2
    assert not list((tmp_path / "run").glob(".*"))
    weights = load(tmp_path / "run" / "average")
    for name, value in by_hand(text.candidates, tmp_path / "run").items():
        assert (weights[name].double() - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.slow
def test_zero3_on_four_ranks_continues_with_fsdp2_on_two(ranks: Pool, text: TrainedCandidates, tmp_path: Path) -> None:
    whole, parts = (settings(text, tmp_path / name, checkpoint_every=2) for name in ("whole", "parts"))
    ranks(run_here, 2, data={**whole, "engine": "fsdp2"})
    task = {"name": "tests.commands.test_deepspeed:stopping", "text": text.task, "after": 2 * 2 + 2}
    with pytest.raises(RuntimeError, match="the job is over"):
        ranks(run_all, 4, timeout=100, runs=[{**parts, "engine": "zero3", "task": task}])
    assert state_of(tmp_path / "parts")["step"] == 2
    ranks(run_here, 2, data={**parts, "engine": "fsdp2"})
    close(load(tmp_path / "parts" / "average"), load(tmp_path / "whole" / "average"))


def stopping(text: dict[str, Any], after: int) -> Any:
    """Return the text task, which stops after `after` calls of its loss in training."""
    from twa_scale.config import TaskConfig
    from twa_scale.run.tasks import build_task

    task: Any = build_task(validated(TaskConfig, text))
    loss, asked = task.loss, iter(range(after))

    def until(model: Any, batch: Any) -> Tensor:
        if next(asked, None) is None:
            raise RuntimeError("the job is over")
        result: Tensor = loss(model, batch)
        return result

    task.loss = until
    return task


def of(**data: Any) -> RunConfig:
    task = {"name": "causal_lm"}
    return validated(RunConfig, {"candidates": "x", "output": "y", "task": task, "steps": 1, **data})


def test_deepspeed_settings_are_derived_from_the_run() -> None:
    config = of(engine="zero2", batch_size=24, micro_batch_size=2, deepspeed={"gradient_clipping": 0.0})
    actual = zero_settings(config, 2, 3)
    assert actual["train_micro_batch_size_per_gpu"] == 2 and actual["gradient_accumulation_steps"] == 4
    assert actual["train_batch_size"] == 24 and actual["zero_optimization"]["stage"] == 2
    assert "torch_autocast" not in actual and actual["gradient_clipping"] == 0.0
    half = of(engine="zero3", precision="bfloat16")
    assert zero_settings(half, 3, 1)["torch_autocast"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, "micro_batch_size"),
        ({"train_batch_size": 7}, "batch_size"),
        ({"zero_optimization": {"stage": 1}}, "stage"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_contradictory_batch_sizes_of_deepspeed_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zero_settings(of(engine="zero3", batch_size=24, micro_batch_size=2, deepspeed=options), 3, 3)


def test_a_json_of_deepspeed_is_a_run(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / "deepspeed.json", ["steps=7", "deepspeed.bf16.enabled=false"])
    assert config.engine == "zero3" and config.steps == 7
    assert config.deepspeed is not None and config.deepspeed["bf16"] == {"enabled": False}
    path = tmp_path / "ds.json"
    wrong: list[object] = [{"stage": 0}, None, []]
    for inputs in wrong:
        path.write_text(json.dumps({"twa": {}, "zero_optimization": inputs}))
        with pytest.raises(ConfigError, match=r"zero_optimization\.stage"):
            load_config(path)
    with pytest.raises(ConfigError, match=r"deepspeed: 'bf16' has to be a mapping"):
        of(engine="zero3", deepspeed={"bf16": True})
    path.write_text(json.dumps({"twa": 3}))
    with pytest.raises(ConfigError, match="twa"):
        load_config(path)
