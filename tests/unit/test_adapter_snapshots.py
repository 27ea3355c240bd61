"""Snapshots and averages of a model that trains an adapter of PEFT are adapters, which PEFT loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import EncodecConfig, LlamaConfig, MusicgenConfig, MusicgenDecoderConfig, T5Config

import twa_scale
from tests import adapters
from tests.adapters import adapted, load, logits, save
from twa_scale import ConfigError, TwaWarning
from twa_scale.engines.live_adapter import _vocabulary

KINDS = {
    "LoRA": LoraConfig(r=4, target_modules=["c_attn", "wte"], fan_in_fan_out=True, modules_to_save=["ln_f"]),
    "DoRA": LoraConfig(r=4, use_dora=True, target_modules=["c_attn"], fan_in_fan_out=True),
    "VeRA": VeraConfig(r=8, target_modules=["lm_head"]),
    "tied": LoraConfig(
        target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["wte", "lm_head"], ensure_weight_tying=True
    ),
    "IA3": IA3Config(target_modules=["c_attn", "mlp.c_fc"], feedforward_modules=["mlp.c_fc"], fan_in_fan_out=True),
}


def move(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def assert_loads(path: Path, model: Any) -> None:
    """Check that PEFT loads an adapter with which the base model has the same outputs, and that it has no more tensors
    than PEFT writes."""
    assert torch.equal(logits(load(path)), logits(model))
    by_peft = Path(save(model, path.parent / f"{path.name}-by-peft"))
    assert (
        load_file(by_peft / "adapter_model.safetensors").keys() == load_file(path / "adapter_model.safetensors").keys()
    )
    config, config_of_peft = (json.loads((p / "adapter_config.json").read_text()) for p in (path, by_peft))
    assert config == config_of_peft


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_snapshots_are_adapters(tmp_path: Path, kind: str, asynchronous: bool) -> None:
    model = adapted(KINDS[kind])
    with twa_scale.Snapshots(tmp_path, every_n_steps=1, asynchronous=asynchronous, max_shard_size=500) as snapshots:
        for step in (1, 2):
            move(model)
            path = snapshots.save(model, step)
    assert_loads(path, model)
    with pytest.warns(TwaWarning, match="the base model keeps its"):
        twa_scale.attach(model, str(tmp_path / "step-*[0-9]"), {"space": "factors"}).close()


@pytest.mark.parametrize("kind", ["LoRA", "tied"])
def test_averages_of_a_training_are_adapters(tmp_path: Path, kind: str) -> None:
    model = adapted(KINDS[kind])
    averages = twa_scale.RunningAverages(model, ema=[0.5], window={"every": 1, "keep": 3, "store": "dense32"})
    for _ in range(3):
        move(model)
        averages.step()
    averages.export(tmp_path / "ema", "ema")
    with averages.weights("ema"):
        assert_loads(tmp_path / "ema", model)
    assert "library_name: peft" in (tmp_path / "ema" / "README.md").read_text()
    saved = averages.save(tmp_path / "window")
    with averages.weights(1):
        assert_loads(saved[1], model)
    with pytest.warns(TwaWarning, match="exports are adapters"), averages.learning({"groups": "block"}) as twa:
        model(adapters.IDS, labels=adapters.IDS).loss.backward()
        twa.step()
        twa.export(tmp_path / "learned")
        assert_loads(tmp_path / "learned", model)
    assert twa.coefficients.shape[0] == 3


def test_injected_adapters_have_the_names_that_transformers_writes(tmp_path: Path) -> None:
    model = adapters.base()
    model.add_adapter(LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False))
    model.save_pretrained(tmp_path / "by-transformers")
    path = twa_scale.Snapshots(tmp_path, every_n_steps=1).save(model, 1)
    actual, wanted = (load_file(p / "adapter_model.safetensors") for p in (path, tmp_path / "by-transformers"))
    assert actual.keys() == wanted.keys() and all(torch.equal(value, wanted[name]) for name, value in actual.items())
    assert json.loads((path / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_snapshots_hold_the_base_model_if_it_is_trained_too(tmp_path: Path) -> None:
    model = adapted(KINDS["LoRA"])
    model.base_model.model.transformer.wpe.weight.requires_grad_(True)
    with pytest.warns(TwaWarning, match=r"because it trains 'base_model\.model\.transformer\.wpe\.weight', which its"):
        path = twa_scale.Snapshots(tmp_path, every_n_steps=1).save(model, 1)
    assert load_file(path / "model.safetensors").keys() >= {"base_model.model.transformer.wpe.weight"}


@pytest.mark.parametrize(
    "settings",
    [{}, {"trainable_token_indices": [41, 42]}, {"modules_to_save": ["wte", "lm_head"]}],
    ids=["frozen", "new tokens", "trained"],
)
def test_adapters_hold_embeddings_that_were_resized(tmp_path: Path, settings: dict[str, Any]) -> None:
    """They may hold values for new tokens. Averages hold them, too."""
    adapters.base().save_pretrained(tmp_path / "base")

    def resized() -> Any:
        base = type(adapters.base()).from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(44)
        return base

    model = get_peft_model(resized(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, **settings))
    with torch.no_grad():
        model.get_input_embeddings().weight[40:] = torch.randn(4, 32)
    averages = twa_scale.RunningAverages(model, window={"every": 1, "keep": 2, "store": "dense32"})
    for _ in range(2):
        move(model)
        averages.step()
    path = twa_scale.Snapshots(tmp_path, every_n_steps=1).save(model, 1)
    assert torch.equal(logits(load(path, base=resized)), logits(model))
    twa_scale.attach(model, [str(path)] * 2, {"space": "factors"}).close()
    with averages.weights("mean"):
        expected = logits(model)
    with averages.learning() as twa:
        twa.export(tmp_path / "learned")
    torch.testing.assert_close(logits(load(tmp_path / "learned", base=resized)), expected)


def test_a_base_model_that_is_not_found_is_reported(tmp_path: Path) -> None:
    base = adapters.base()
    base.name_or_path = base.config._name_or_path = str(tmp_path / "moved")
    model = get_peft_model(base, KINDS["DoRA"])
    with pytest.warns(TwaWarning, match="moved' is not in a directory or in the cache"):
        twa_scale.Snapshots(tmp_path, every_n_steps=1).save(model, 1)


def test_snapshots_hold_the_base_model_if_it_has_statistics(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = get_peft_model(base, LoraConfig(target_modules=["0"]))
    averages = twa_scale.RunningAverages(model, ema={"decays": [0.5], "use_buffers": True})
    for _ in range(2):
        model(torch.randn(8, 4))
        averages.step()
    with pytest.warns(TwaWarning, match="because its statistics"):
        averages.export(tmp_path / "ema", "ema")
    name = "base_model.model.1.running_mean"
    with averages.weights("ema"):
        assert torch.equal(load_file(tmp_path / "ema/model.safetensors")[name], model.get_buffer(name))


def test_statistics_that_an_adapter_replaces_need_no_base_model(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = get_peft_model(base, LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    path = twa_scale.Snapshots(tmp_path, every_n_steps=1).save(model, 1)
    assert "base_model.model.1.running_mean" in load_file(path / "adapter_model.safetensors")


def test_the_class_of_the_base_model_is_not_that_of_a_wrapper(tmp_path: Path) -> None:
    model = adapted(KINDS["DoRA"])
    model.base_model.model = checkpoint_wrapper(model.base_model.model)
    path = twa_scale.Snapshots(tmp_path, every_n_steps=1).save(model, 1)
    kind = {"base_model_class": "GPT2LMHeadModel", "parent_library": "transformers.models.gpt2.modeling_gpt2"}
    assert json.loads((path / "adapter_config.json").read_text())["auto_mapping"] == kind


def test_names_of_weight_files_are_refused_early(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors' is taken"):
        twa_scale.Snapshots(tmp_path, every_n_steps=1, files={"adapter_model.safetensors": b""})


def test_two_active_adapters_are_written_with_the_base_model(tmp_path: Path) -> None:
    model = adapted(KINDS["DoRA"])
    model.add_adapter("second", KINDS["DoRA"])
    model.base_model.set_adapter(["default", "second"])
    with pytest.warns(TwaWarning, match="hold the base model too, because .* 2 active adapters"):
        path = twa_scale.Snapshots(tmp_path, every_n_steps=1).save(model, 1)
    assert len(load_file(path / "model.safetensors")) == len(dict(model.named_parameters()))


def test_a_parameter_that_was_frozen_after_the_snapshots_is_named(tmp_path: Path) -> None:
    model = adapted(KINDS["DoRA"])
    position = model.base_model.model.transformer.wpe.weight.requires_grad_(True)
    averages = twa_scale.RunningAverages(model, window={"every": 1, "keep": 2})
    for _ in range(2):
        move(model)
        averages.step()
    position.requires_grad_(False)
    with pytest.raises(twa_scale.TwaError, match=r"wpe\.weight', which was trained when they were taken"):
        averages.learn({"space": "factors"})


def test_the_vocabulary_of_a_model_of_several_texts_is_unknown() -> None:
    parts = {"text_encoder": T5Config(), "audio_encoder": EncodecConfig(), "decoder": MusicgenDecoderConfig()}
    config = MusicgenConfig(**{name: part.to_dict() for name, part in parts.items()})
    with pytest.raises(ValueError, match="Multiple valid text configs"):
        config.get_text_config()
    assert _vocabulary(config) is None and _vocabulary(LlamaConfig(vocab_size=7)) == 7 and _vocabulary(None) is None
