"""Every file of configs/ is valid and runs on data and sizes that fit this machine."""

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.commands.conftest import CommandResult, TrainedCandidates
from tests.commands.small_runs import by_hand, load, run_here
from tests.grid import rest_slow
from tests.pool import Pool
from twa_scale.config import load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
# The number of ranks for each configuration, and the data that replaces the user's.
RUNS = {
    "fsdp2-node": (2, "text"),
    "fsdp2-slurm": (2, "text"),
    "iclr": (1, "digits"),
    "pods": (2, "text"),
    "tail": (2, "text"),
}
TESTED_ELSEWHERE = {
    "quickstart",
    "soup",
    "zero3",
    "scale",
}  # tested elsewhere: by `make`, below, under deepspeed, in tests/scale


@pytest.mark.parametrize("config", [*CONFIGS, ROOT / "configs/deepspeed.json"], ids=lambda path: path.name)
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "mpi", "slurm"])
def test_configuration_is_valid(shell: Callable[..., CommandResult], config: Path, launcher: str) -> None:
    loaded = load_config(config)
    assert loaded.candidates and loaded.task.name
    result = shell("launch", "--with", launcher, config, "--ranks-per-node", 2, "--dry-run")
    assert result.code == 0 and str(config) in shlex.split(result.out), result.err


def test_each_configuration_is_tested() -> None:
    assert {path.stem for path in CONFIGS} == {*RUNS, *TESTED_ELSEWHERE}


@pytest.mark.parametrize("name", rest_slow([(name,) for name in RUNS], lambda name: name != "fsdp2-slurm"))
def test_configuration_runs(
    name: str,
    ranks: Pool,
    text: TrainedCandidates,
    digits: TrainedCandidates,
    tmp_path: Path,
    shell: Callable[..., CommandResult],
) -> None:
    """Only paths and sizes are changed. The method is that of the file."""
    size, kind = RUNS[name]
    trained_candidates = {"text": text, "digits": digits}[kind]
    settings: dict[str, Any] = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    settings |= {
        "candidates": trained_candidates.candidates,
        "task": trained_candidates.task,
        "output": str(tmp_path / "out"),
    }
    settings |= {"steps": 3, "batch_size": 8, "micro_batch_size": 2, "evaluate_every": 2, "evaluate_batches": 1}
    settings |= {"evaluate_split": "validation", "recalibrate_batches": 4}
    settings.pop("epochs", None)
    summary = ranks(run_here, size, timeout=120, data=settings)[0]
    assert summary["steps"] == 3 and summary["ranks"] == size
    exported = load(tmp_path / "out" / "average")
    tolerance = 2e-2 if settings.get("store") in ("dense16", "packed8") else 1e-4
    if settings.get("recipe") == "tail":  # has corrections of rows
        assert shell("export", tmp_path / "out", "--out", tmp_path / "merged").code == 0
        averages = load(tmp_path / "merged")
    else:
        averages = by_hand(trained_candidates.candidates, tmp_path / "out")
    for tensor, expected in averages.items():
        assert (exported[tensor].double() - expected).norm() <= tolerance * expected.norm(), tensor


@pytest.mark.slow
def test_the_soup_of_pretrained_transformers(tmp_path: Path) -> None:
    """The steps of `make soup` with fewer steps, with the real weights of MiniLM and real sentences.

    Its ten programs are processes of their own, forked from one that has imported what they need.
    """
    sentences = ROOT / ".venv/share/vaderSentiment-3.3.2.tar.gz"
    assert sentences.exists(), "the sentences are missing: `make test-slow` fetches them"
    options = ["--ingredients=2", "--steps=2", "--epochs=0.05", "--batches=1"]
    command = [ROOT / "examples/soup/run.py", f"--sentences={sentences}", f"--out={tmp_path}", *options]
    forked = [sys.executable, "-m", "tests.forked_programs", *map(str, command)]
    subprocess.run(forked, check=True, cwd=ROOT)
    average = load_file(tmp_path / "twa/average/model.safetensors")
    for name, expected in by_hand(f"{tmp_path}/finetune/*", tmp_path / "twa").items():
        assert (average[name].double() - expected).norm() <= 1e-5 * expected.norm(), name
    assert (tmp_path / "twa/average/tokenizer.json").exists()
