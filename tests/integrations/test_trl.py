"""Averages in the trainers of TRL, with examples/trl/train.py. Skipped without `trl`, which `make setup` omits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl")

from examples.trl.train import TRAINERS, train, write_start
from twa_scale.integrations.transformers import TwaCallback

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

STEPS, HALF, DECAY, MODULES = 6, 3, 0.5, 6
EVERY: dict[str, Any] = {
    "max_steps": STEPS,
    "save_steps": 1,
    "learning_rate": 1e-2,
    "bf16": False,
    "gradient_accumulation_steps": 2,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_start(tmp_path_factory.mktemp("start"), MODULES)


def weights_in(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_trainer_keeps_averages_resumes_them_and_learns(kind: str, start: Path, tmp_path: Path) -> None:
    def run(directory: Path, resume: str | None = None) -> Any:
        window = {"every": 1, "keep": 3}
        callback = TwaCallback(
            ema=[DECAY], window=window, evaluate_also=["last", "mean"], learn={"groups": "block"}, learn_steps=2
        )
        every = {**EVERY, "eval_strategy": "steps", "eval_steps": HALF}
        return train(kind, start, directory, callback, modules=MODULES, resume=resume, **every)

    trainer = run(tmp_path)
    steps = [weights_in(tmp_path / f"checkpoint-{step + 1}") for step in range(STEPS)]
    average = steps[0]
    for weights in steps[1:]:
        average = {name: DECAY * average[name] + (1 - DECAY) * weights[name] for name in average}
    ema = weights_in(tmp_path / f"checkpoint-{STEPS}/average")
    for name, value in average.items():
        torch.testing.assert_close(ema[name], value, rtol=1e-5, atol=1e-6)

    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert {f"eval_{of}mean_token_accuracy" for of in ("", "last_", "mean_", "average_")} <= logged.keys()
    assert logged["twa_step"] == 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(logged["eval_last_loss"])
    for directory, name in ((f"checkpoint-{STEPS}/average", "eval_loss"), ("average", "eval_average_loss")):
        trainer.model.load_state_dict(weights_in(tmp_path / directory), strict=False)  # a tied head is stored once
        assert trainer.evaluate()["eval_loss"] == pytest.approx(logged[name], abs=1e-6)
    learned = weights_in(tmp_path / "average")
    assert len(json.loads((tmp_path / "average/twa_scale.json").read_text())["candidates"]) == 3

    run(tmp_path, str(tmp_path / f"checkpoint-{HALF}"))
    assert same(weights_in(tmp_path / f"checkpoint-{STEPS}"), steps[-1])
    assert same(weights_in(tmp_path / f"checkpoint-{STEPS}/average"), ema)
    assert same(weights_in(tmp_path / "average"), learned)


@pytest.mark.parametrize("kind", TRAINERS)
def test_coefficients_of_candidates_are_trained_and_resumed(kind: str, start: Path, tmp_path: Path) -> None:
    train("sft", start, tmp_path / "made", modules=MODULES, **EVERY)
    candidates = str(tmp_path / "made/checkpoint-*")
    train(kind, start, tmp_path / "out", candidates=candidates, modules=MODULES, **EVERY)
    learned = weights_in(tmp_path / "out/average")
    uniform = {
        name: torch.stack([weights_in(path)[name] for path in tmp_path.glob("made/checkpoint-*")]).mean(0)
        for name in learned
    }
    assert not all(torch.allclose(learned[name], value, atol=1e-6) for name, value in uniform.items())
    train(
        kind,
        start,
        tmp_path / "out",
        candidates=candidates,
        modules=MODULES,
        resume=str(tmp_path / f"out/checkpoint-{HALF}"),
        **EVERY,
    )
    assert same(weights_in(tmp_path / "out/average"), learned)
