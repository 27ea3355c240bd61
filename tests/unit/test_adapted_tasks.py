"""Tasks with an adapter of PEFT: the base model may lack a head, or have another one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

import twa_scale
from twa_scale.config import TaskConfig, validated
from twa_scale.run.tasks import build_task


def adapter_of(bert: str, path: Path, **settings: Any) -> Any:
    """Write an adapter of a model with three classes, where `bert` has two."""
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3, ignore_mismatched_sizes=True)
    model = get_peft_model(base, LoraConfig(**{"target_modules": ["query"], "init_lora_weights": False, **settings}))
    model.save_pretrained(path)
    return model


def task_with(bert: str, path: Path, adapter: Path) -> Any:
    path.write_text("text,label\na film,0\nno film,1\na cat,2\n")
    options = {
        "name": "sequence_classification",
        "model": bert,
        "adapter": str(adapter),
        "train": str(path),
        "num_labels": 3,
    }
    return build_task(validated(TaskConfig, options))


def test_the_head_is_that_of_the_adapter(bert: str, tmp_path: Path) -> None:
    wanted = adapter_of(bert, tmp_path / "lora", task_type="SEQ_CLS").state_dict()
    task = task_with(bert, tmp_path / "a.csv", tmp_path / "lora")
    actual = task.model().state_dict()
    assert actual.keys() == wanted.keys()
    for name, value in actual.items():
        assert torch.equal(value, wanted[name]) or "classifier.original_module" in name
    with torch.device("meta"):
        assert task.model().state_dict().keys() == wanted.keys()


@pytest.mark.parametrize("modules", [["query"], ["query", "classifier"]])
def test_a_head_that_nobody_has_is_named(bert: str, tmp_path: Path, modules: list[str]) -> None:
    """Factors for a head do not hold the head."""
    adapter_of(bert, tmp_path / "lora", target_modules=modules)
    with pytest.raises(twa_scale.ConfigError, match=r"task\.adapter: neither .* has 'classifier.bias', 'classifier.w"):
        task_with(bert, tmp_path / "a.csv", tmp_path / "lora").model()


def test_an_adapter_without_weights_is_not_searched_for_elsewhere(bert: str, tmp_path: Path) -> None:
    adapter_of(bert, tmp_path / "lora")
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    with pytest.raises(twa_scale.ConfigError, match=r"lora' has no adapter_model\.safetensors or adapter_model\.bin"):
        task_with(bert, tmp_path / "a.csv", tmp_path / "lora")
