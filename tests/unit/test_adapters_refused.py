"""Refused PEFT adapters: settings that change the meaning of tensors, and live adapters that cannot be averaged."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, RandLoraConfig, ShiraConfig, VBLoRAConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM

import twa_scale
from tests import adapters
from tests.adapters import adapted, load, logits, save
from twa_scale import TwaError
from twa_scale.candidates import Wanted
from twa_scale.merge import average_fixed
from twa_scale.tools.inspection import inspect

BOTH = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return two LoRA adapters that differ only in their tensors."""
    root = tmp_path_factory.mktemp("alike")
    return [save(adapted(seed=i), root / f"step-{i}") for i in range(2)]


def changed(adapter: str, path: Path, **settings: Any) -> str:
    """Copy an adapter with other settings in adapter_config.json."""
    shutil.copytree(adapter, path)
    config = path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return str(path)


def expert_adapter(seed: int, path: Path, **lora: Any) -> str:
    return save(adapters.experts(seed, r=2, **lora), path)


def test_patterns_have_the_names_of_parameters(tmp_path: Path) -> None:
    """The factors of `target_parameters` are scaled as PEFT scales them."""
    settings = {"target_modules": ["q_proj"]}
    first = expert_adapter(0, tmp_path / "0", **settings, alpha_pattern={"mlp.experts.gate_up_proj": 32})
    second = expert_adapter(1, tmp_path / "1", **settings)
    average_fixed([f"{first}:1.0", f"{second}:0.0"], tmp_path / "out", space="factors")
    expected = logits(load(first, base=adapters.mixture))
    torch.testing.assert_close(logits(load(tmp_path / "out", base=adapters.mixture)), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(TwaError, match=r"space: product is not possible: alpha_pattern with target_parameters"):
        average_fixed([first, second], tmp_path / "product", space="product")


def test_patterns_that_distinguish_parameters_of_one_module(tmp_path: Path) -> None:
    """Files do not contain which factors belong to which parameter. Equal settings need no scalings."""
    pattern = {"mlp.experts.gate_up_proj": 32}
    paths = [expert_adapter(i, tmp_path / f"{i}", **BOTH, alpha_pattern=pattern) for i in range(2)]
    plain = expert_adapter(2, tmp_path / "2", **BOTH)
    with pytest.raises(TwaError, match=r"alpha_pattern gives parameters of '.*experts.*' different values"):
        average_fixed([*paths, plain], tmp_path / "out", space="factors")
    model = load(paths[-1], trainable=True, base=adapters.mixture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twa = twa_scale.attach(model, paths, {"space": "factors"})
    with twa.weights(0):
        expected = logits(load(paths[0], base=adapters.mixture))
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert inspect(paths, wanted=Wanted(space="factors")).adapters == ["LORA, rank 2, scaling 4 to 16"] * 2


def test_olora_of_other_scalings(alike: list[str], tmp_path: Path) -> None:
    paths = [changed(path, tmp_path / f"{i}", init_lora_weights="olora") for i, path in enumerate(alike)]
    average_fixed(paths, tmp_path / "out", space="factors")
    other = changed(alike[0], tmp_path / "other", init_lora_weights="olora", lora_alpha=3)
    with pytest.raises(
        TwaError, match=r"other.adapter_config.json: OLoRA scales .* by 0\.75, and by 2 in .*1.adapter_config"
    ):
        average_fixed([other, *paths], tmp_path / "no", space="factors")


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        ({"trainable_token_indices": [1]}, {"trainable_token_indices": [2]}),
        ({"init_lora_weights": "pissa"}, {}),
        ({"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}),
        ({"layer_replication": [[0, 2]]}, {}),
        ({"alora_invocation_tokens": [3]}, {"alora_invocation_tokens": [4]}),
        ({"target_parameters": ["a.b"]}, {}),
        ({"peft_type": "LOHA", "alpha": 4}, {"peft_type": "LOHA", "alpha": 8}),
        ({"peft_type": "IA3", "feedforward_modules": ["a"]}, {"peft_type": "IA3"}),
        ({"peft_type": "VERA", "projection_prng_key": 1}, {"peft_type": "VERA", "projection_prng_key": 0}),
    ],
)
def test_settings_that_change_the_meaning(
    settings: dict[str, Any], last: dict[str, Any], alike: list[str], tmp_path: Path
) -> None:
    paths = [changed(alike[0], tmp_path / "a", **settings), changed(alike[1], tmp_path / "b", **last)]
    key = next(key for key in settings if settings[key] != last.get(key))
    with pytest.raises(TwaError, match=rf"a.adapter_config.json: {key} is .* mean different things"):
        average_fixed(paths, tmp_path / "out", space="factors")


def test_disabled_settings_are_not_differences(alike: list[str], tmp_path: Path) -> None:
    """Older versions of PEFT do not write all settings. Lists of names may have any order."""
    first = changed(alike[0], tmp_path / "a", use_dora=None, layer_replication=[], target_parameters=["a.b", "c.d"])
    second = changed(alike[1], tmp_path / "b", target_parameters=["c.d", "a.b"])
    average_fixed([first, second], tmp_path / "out", space="factors")


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (
            VBLoRAConfig(r=2, num_vectors=8, vector_length=8, target_modules=["c_attn"], save_only_topk_weights=True),
            r"'default' \(VBLORA\): get_peft_model_state_dict of peft \d.*IndexError.*merge_and_unload",
        ),
        (RandLoraConfig(r=2, target_modules=["c_attn"]), r"\(RANDLORA\): .*random projections.*twa-scale average"),
        (ShiraConfig(r=2, target_modules=["lm_head"]), r"\(SHIRA\): .*indices.*twa-scale average"),
    ],
    ids=["VB-LoRA", "RandLora", "SHiRA"],
)
def test_adapters_that_attach_refuses(config: Any, rule: str, alike: list[str]) -> None:
    with pytest.raises(TwaError, match=rule):
        twa_scale.attach(adapted(config), alike, {"space": "factors"})


def test_tied_factors_are_views(alike: list[str]) -> None:
    config = adapters.mixture().config
    config.tie_word_embeddings = True
    tied = LoraConfig(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(MixtralForCausalLM(config), tied)
    rule = r"'.*lm_head.*' is a transposed view of '.*embed_tokens.*' \(ensure_weight_tying .*twa-scale average"
    with pytest.raises(TwaError, match=rule):
        twa_scale.attach(model, alike)


@pytest.mark.parametrize("attribute", ["scaling", "r"])
def test_attributes_of_peft_are_checked(attribute: str, alike: list[str]) -> None:
    model = load(alike[-1], trainable=True)
    delattr(model.base_model.model.transformer.h[1].attn.c_attn, attribute)
    with pytest.raises(TwaError, match=rf"of peft \d.* has no '{attribute}', .*use peft 0\.21"):
        twa_scale.attach(model, alike, {"space": "factors"})


def test_a_named_adapter_is_in_a_subdirectory(tmp_path: Path) -> None:
    adapted().save_pretrained(str(tmp_path / "plain"), save_embedding_layers=False)
    shutil.copytree(tmp_path / "plain", tmp_path / "named/style")
    with pytest.raises(TwaError, match=r"named: is no candidate, but .*'style' holds an adapter.*named/style"):
        average_fixed([str(tmp_path / "named"), str(tmp_path / "plain")], tmp_path / "out")


def test_adapters_with_one_equal_factor_have_different_products(alike: list[str], tmp_path: Path) -> None:
    first = load_file(f"{alike[0]}/adapter_model.safetensors")
    second = load_file(f"{alike[1]}/adapter_model.safetensors")
    shutil.copytree(alike[1], tmp_path / "b")
    file = tmp_path / "b/adapter_model.safetensors"
    save_file({name: (first if name.endswith(("B", "B.weight")) else second)[name] for name in first}, file)
    paths = [alike[0], str(tmp_path / "b")]
    average_fixed(paths, tmp_path / "start", space="product")
    model = load(tmp_path / "start", trainable=True)
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        twa_scale.attach(model, paths, {"space": "product"})
    assert not [str(item.message) for item in messages if "is redundant" in str(item.message)]
