"""Snapshots and averages of a model of transformers have its configuration, so that `from_pretrained` loads them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import twa_scale
from twa_scale import TwaWarning

IDS = torch.arange(12).view(1, 12) % 7


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))


def assert_loads(path: Path, model: LlamaForCausalLM) -> None:
    loaded = LlamaForCausalLM.from_pretrained(path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_outputs_load_with_from_pretrained(tmp_path: Path) -> None:
    model = llama()
    assert_loads(twa_scale.Snapshots(tmp_path, every_n_steps=1).save(model, 1), model)
    averages = twa_scale.RunningAverages(model, ema=[0.9], window={"every": 1, "keep": 2})
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
        averages.step()
    averages.export(tmp_path / "ema", "ema", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "ema/config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["LlamaForCausalLM"]
    assert (tmp_path / "ema/generation_config.json").exists()
    with averages.learning() as twa:
        model(input_ids=IDS, labels=IDS).loss.backward()
        twa.step()
        twa.export(tmp_path / "learned")
        assert_loads(tmp_path / "learned", model)


def test_files_of_the_user_replace_those_of_the_model(tmp_path: Path) -> None:
    files = {"config.json": b'{"own": 1}'}
    path = twa_scale.Snapshots(tmp_path, every_n_steps=1, files=files).save(llama(), 1)
    assert json.loads((path / "config.json").read_text())["own"] == 1


def test_a_configuration_that_cannot_be_saved_is_reported(tmp_path: Path) -> None:
    model = llama()
    model.generation_config.temperature = 0.5  # without sampling, which transformers refuses to save
    with pytest.warns(TwaWarning, match=r"lack generation_config\.json, because transformers cannot save it \(Value"):
        path = twa_scale.Snapshots(tmp_path, every_n_steps=1).save(model, 1)
    assert_loads(path, model)
