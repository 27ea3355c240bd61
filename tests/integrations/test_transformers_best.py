"""The best checkpoint of a Trainer whose optimizer is an average."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import twa_scale
from tests.integrations.train_transformers import LEARN, Texts, build
from twa_scale.integrations.transformers import CoefficientsCallback


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.filterwarnings("ignore::twa_scale.TwaWarning")
def test_the_best_checkpoint_is_loaded_with_its_coefficients(tmp_path: Path, given: bool) -> None:
    """Without the callback an export has no coefficients, because the Trainer has loaded weights of other ones."""
    model, states = build(9), [build(seed).state_dict() for seed in range(3)]
    twa = twa_scale.attach(model, states, {**LEARN, "groups": "global"})
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    args = TrainingArguments(str(tmp_path), learning_rate=0.1, report_to=[], use_cpu=True, disable_tqdm=True, **options)
    callbacks = [CoefficientsCallback(twa)] if given else []
    data = {"train_dataset": Texts(), "eval_dataset": Texts()}
    trainer = Trainer(model=model, args=args, **data, optimizers=(twa.as_optimizer(), None), callbacks=callbacks)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    twa.export(tmp_path / "average")
    origin = json.loads((tmp_path / "average/twa_scale.json").read_text())
    assert ("coefficients" in origin) == given == ("the sum of a" in (tmp_path / "average/README.md").read_text())
    written, best = (load_file(tmp_path / name / "model.safetensors") for name in ("average", "checkpoint-1"))
    for name, value in best.items():
        torch.testing.assert_close(written[name], value)
        if given:
            (weights,) = zip(*origin["coefficients"], strict=True)
            expected = sum(a * state[name] for a, state in zip(weights, states, strict=True))
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
