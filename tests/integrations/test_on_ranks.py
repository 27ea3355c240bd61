"""Averages in Lightning and with Accelerate on two ranks. All trainings run in the same two processes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations import train_accelerate, train_lightning
from tests.integrations.small import require_equal, require_learned, train_by_hand, weights_of
from tests.integrations.train_lightning import Module, data, trainer_with

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def by_hand() -> dict[str, Any]:
    return train_by_hand()


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the trainings."""
    directory = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.integrations.train_on_ranks", str(directory)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def saved(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [torch.load(directory / f"{kind}-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", train_lightning.KINDS)
def test_lightning_keeps_averages(kind: str, on_ranks: Path, by_hand: dict[str, Any]) -> None:
    for actual in saved(on_ranks / "lightning", kind):
        train_lightning.require_results(actual, by_hand, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", train_accelerate.KINDS)
def test_accelerate_keeps_averages(kind: str, on_ranks: Path, by_hand: dict[str, Any]) -> None:
    for actual in saved(on_ranks / "accelerate", kind):
        train_accelerate.require_results(actual, by_hand, 1e-6)


@pytest.mark.slow
def test_an_average_of_an_interrupted_validation_is_not_saved_as_trained_weights(on_ranks: Path) -> None:
    for actual in saved(on_ranks, "interrupted"):
        assert "could not restore the trained weights" in actual["told"] and not actual["left"]


@pytest.mark.slow
def test_averages_of_lightning_are_checkpoints(on_ranks: Path, by_hand: dict[str, Any]) -> None:
    trainer, module = trainer_with("automatic", on_ranks), Module()
    trainer.validate(
        module,
        data(),
        ckpt_path=on_ranks / "lightning" / "ddp" / "average" / "average.ckpt",
        verbose=False,
        weights_only=True,
    )
    require_equal(weights_of(module.net), by_hand["ema"], 1e-6)
    trainer.validate(
        module, data(), ckpt_path=on_ranks / "lightning" / "ddp-learned.ckpt", verbose=False, weights_only=True
    )
    require_learned(weights_of(module.net), by_hand)
