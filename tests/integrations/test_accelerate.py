"""Averages in loops with Accelerate, in one process and on two ranks. One test runs the example of trainers.md."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from tests.integrations.examples import run_example
from tests.integrations.small import (
    DECAY,
    STEPS,
    WINDOW,
    coefficients_by_hand,
    require_equal,
    require_learned,
    train_by_hand,
)
from tests.integrations.train_accelerate import KINDS, Training, results
from twa_scale import ConfigError, TwaError, TwaWarning
from twa_scale.integrations.accelerate import prepare

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def by_hand() -> dict[str, Any]:
    return train_by_hand()


@pytest.fixture(autouse=True)
def fresh() -> Any:
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of trainings on two ranks."""
    directory = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.integrations.train_accelerate", str(directory)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def require_results(found: dict[str, Any], by_hand: dict[str, Any], tolerance: float) -> None:
    """Averages, resumed averages, and coefficients, learned from the window or of given candidates."""
    assert found["steps"] == STEPS and found["same"]
    require_equal(found["trained"], by_hand["trained"], tolerance)
    require_equal(found["ema"], by_hand["ema"], tolerance)
    require_equal(found["resumed"], by_hand["ema"], tolerance)
    require_learned(found["learned"], by_hand)
    require_equal(found["trained again"], found["trained"])
    torch.testing.assert_close(found["coefficients"], coefficients_by_hand(), rtol=0, atol=1e-6)
    assert torch.equal(found["coefficients again"], found["coefficients"])


@pytest.mark.slow
def test_a_loop_keeps_averages(tmp_path: Path, by_hand: dict[str, Any]) -> None:
    require_results(results("plain", tmp_path), by_hand, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_keeps_averages_on_two_ranks(kind: str, on_ranks: Path, by_hand: dict[str, Any]) -> None:
    for rank in range(2):
        require_results(torch.load(on_ranks / f"{kind}-{rank}.pt", weights_only=True), by_hand, 1e-6)


def test_what_would_count_wrongly_is_refused(tmp_path: Path) -> None:
    one = Training("plain")
    averages = prepare(one.accelerator, one.model, ema=[DECAY], window=WINDOW)
    with pytest.raises(TwaError, match="counts the steps of the optimizer itself"):
        averages.step()
    with pytest.raises(ConfigError, match="averages named 'averages' already"):
        prepare(one.accelerator, one.model, ema=[0.9])
    with pytest.raises(ConfigError, match=r"not one that accelerator\.prepare has returned"):
        prepare(one.accelerator, torch.nn.Linear(2, 2), ema=[0.9])
    with pytest.raises(ConfigError, match="no optimizer that the accelerator has prepared"):
        prepare(one.accelerator, one.accelerator.prepare(torch.nn.Linear(2, 2)), ema=[0.9], name="b")
    one.accelerator.save_state(str(tmp_path))
    (tmp_path / "averages" / "averages-00000-of-00001.pt").unlink()
    with pytest.warns(TwaWarning, match="has no averages"):
        one.accelerator.load_state(str(tmp_path))


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = Training("plain")
    names = {"accelerator": one.accelerator, "model": one.model, "optimizer": one.optimizer, "loader": one.loader}
    names |= {"loss_of": lambda model, batch: (model(batch) - batch).square().mean(), "evaluate": lambda model: 0.0}
    run_example("accelerate", names)
    found = load_file(tmp_path / "out" / "average" / "model.safetensors")
    assert not torch.equal(found["0.weight"], one.weights()["0.weight"])  # the trained weights are there again
