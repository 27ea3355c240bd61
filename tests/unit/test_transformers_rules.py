"""Files that transformers converts when it loads them: repeated and missing tensors, and prefixes."""

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping, core_model_loading

import twa_scale
from tests.architectures import ARCHITECTURES
from twa_scale.base.notices import TwaWarning
from twa_scale.candidates.numbered import missing_tensors
from twa_scale.errors import CandidateError

SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 16,
    "max_position_embeddings": 8,
}
EXPERTS = "model.layers.0.block_sparse_moe.experts"
Weights = dict[str, torch.Tensor]


def mixtral() -> transformers.PreTrainedModel:
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def neox() -> transformers.PreTrainedModel:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES))


def stored(model: transformers.PreTrainedModel, directory: Path) -> Weights:
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def twice(weights: Weights, directory: Path) -> list[Path]:
    """Write two candidates, the last of which has these weights."""
    paths = [directory / f"step-{i}.safetensors" for i in range(2)]
    for i, path in enumerate(paths):
        save_file({name: value + 1 - i for name, value in weights.items()}, path)
    return paths


def test_experts_that_are_stored_one_by_one_and_stacked_are_refused(tmp_path: Path) -> None:
    weights = stored(mixtral(), tmp_path)
    weights["model.layers.0.mlp.experts.down_proj"] = torch.zeros(4, 8, 12)
    message = rf"'model\.layers\.0\.mlp\.experts\.down_proj' and '{EXPERTS}\.0\.w2\.weight'.* are both 'model\.layers"
    with pytest.raises(CandidateError, match=message):
        twa_scale.attach(mixtral(), twice(weights, tmp_path))


@pytest.mark.parametrize(
    ("removed", "missing"),
    [
        (r"experts\.2\.w1", f"'{EXPERTS}.2.w1.weight' is missing"),
        (r"experts\.1\.", f"'{EXPERTS}.1.w1.weight', '{EXPERTS}.1.w3.weight' are missing"),
        (r"experts\.3\.w2", f"'{EXPERTS}.3.w2.weight' is missing"),
        (r"experts\.\d\.w1", "experts.*.w1.weight' is missing"),
    ],
)
def test_the_expert_that_is_missing_is_named(removed: str, missing: str, tmp_path: Path) -> None:
    weights = {name: value for name, value in stored(mixtral(), tmp_path).items() if not re.search(removed, name)}
    with pytest.raises(
        CandidateError, match=rf"{re.escape(missing)}, of which transformers makes tensor 'model\.layers"
    ):
        twa_scale.attach(mixtral(), twice(weights, tmp_path))


def test_experts_that_are_stored_transposed_under_the_same_names(tmp_path: Path) -> None:
    """Qwen3-VL-MoE on the hub has such tensors: transformers compares the shapes, and transposes."""
    (vision,) = (item for item in ARCHITECTURES if item.model == "Qwen3VLMoeForConditionalGeneration")
    config = transformers.Qwen3VLMoeConfig(**vision.settings)
    config.text_config.moe_intermediate_size = 12  # no matrix of an expert is square
    paths = [tmp_path / f"step-{i}" for i in range(2)]
    for i, path in enumerate(paths):
        torch.manual_seed(i)
        weights = stored(transformers.Qwen3VLMoeForConditionalGeneration(config), path)
        weights = {n: v.mT.contiguous() if ".mlp.experts." in n else v for n, v in weights.items()}
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    loaded = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(paths[1]).state_dict()
    model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    twa = twa_scale.attach(model, paths, {"center": 1})
    assert twa.bytes_read == 2 * sum(value.nbytes for value in weights.values())
    live = model.state_dict()
    assert not [name for name, value in loaded.items() if not torch.equal(value, live[name])]
    twa.export(tmp_path / "out")
    exported = load_file(tmp_path / "out/model.safetensors")
    assert exported.keys() == weights.keys() and all(torch.equal(exported[n], v) for n, v in weights.items())


def test_only_numbers_that_differ_in_one_place_are_counted() -> None:
    assert missing_tensors({"w": ["a.0.b.1", "a.0.b.3"]}) == ["a.0.b.0", "a.0.b.2"]
    assert (
        missing_tensors({"w": ["a.0.b.0", "a.1.b.1"]})
        == missing_tensors({"q": ["q.7"], "k": ["k.7"]})
        == missing_tensors({"w": []})
        == []
    )
    assert (
        missing_tensors({"w": ["a.0", "a.1"]}, (2, 3)) == ["a.2"]
        and missing_tensors({"w": ["a.0", "a.1"]}, (4, 6)) == []
    )


def test_a_prefix_before_names_that_the_library_changes_is_found(tmp_path: Path) -> None:
    weights = stored(neox(), tmp_path)
    paths = twice({f"net.{name}": value for name, value in weights.items()}, tmp_path)
    assert "net.embed_out.weight" in load_file(paths[0])
    model = neox()
    with pytest.warns(UserWarning, match=r"names have the prefix 'net\.'"):
        twa_scale.attach(model, paths, {"center": "last"}).export(tmp_path / "out")
    expected = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path).state_dict()
    torch.testing.assert_close(model.state_dict(), expected)
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(paths[0]).keys()


@pytest.mark.parametrize("module", ["conversion_mapping", "core_model_loading"])
def test_transformers_without_rules_keeps_names(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = neox()
    names = model.state_dict().keys()
    paths = twice({f"net.{name}": value.clone() for name, value in model.state_dict().items()}, tmp_path)
    monkeypatch.setitem(sys.modules, f"transformers.{module}", None)
    with pytest.warns(UserWarning, match=r"names have the prefix 'net\.'"):
        twa_scale.attach(model, paths).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error", TwaWarning)
        snapshot = twa_scale.Snapshots(tmp_path / "snapshots", every_n_steps=1).step(model, 1)
    assert snapshot and load_file(snapshot / "model.safetensors").keys() == names


@pytest.mark.parametrize(("owner", "name"), [(core_model_loading, "rename_source_key"), (None, "layer_targets")])
def test_missing_functions_of_transformers_are_named(
    owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = twice(stored(neox(), tmp_path), tmp_path)
    monkeypatch.delattr(owner or core_model_loading.WeightTransform, name)
    with pytest.raises(CandidateError, match=rf"of transformers \d.* has no '{name}'.*; use transformers 5"):
        twa_scale.attach(neox(), paths)


def test_rules_that_are_looked_up_by_the_class_of_a_model_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the first versions of transformers 5."""
    rules, classes = conversion_mapping.get_model_conversion_mapping, []

    def by_class(model: Any, **options: Any) -> Any:
        classes.extend(model.__class__.__mro__[:-1])
        return rules(model, **options)

    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", by_class)
    twa_scale.attach(mixtral(), twice(stored(mixtral(), tmp_path), tmp_path))
    assert transformers.MixtralForCausalLM in classes
