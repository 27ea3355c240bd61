"""PEFT adapters, written and read by PEFT: averages of factors and of products, attach, export and inspect."""

import json
import warnings
from collections.abc import Mapping
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import twa_scale
from tests import adapters
from tests.adapters import adapted, load, logits, save, updates, weighted
from tests.states import save_run
from twa_scale import TwaError
from twa_scale.base.notices import TwaWarning
from twa_scale.candidates import Wanted, open_candidates
from twa_scale.merge import average_fixed, export_run
from twa_scale.tools.inspection import inspect, inspection_table

A = [0.5, 0.75, -0.25]
MIXED: list[dict[str, Any]] = [
    {"modules_to_save": ["ln_f"]},
    {"modules_to_save": ["ln_f"], "r": 6, "lora_alpha": 3, "use_rslora": True},
    {
        "modules_to_save": ["ln_f"],
        "r": 2,
        "rank_pattern": {"h.1.attn.c_attn": 3},
        "alpha_pattern": {"transformer.wte": 7},
    },
]
KEPT = "the base model keeps its"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return three adapters of different ranks and scalings."""
    root = tmp_path_factory.mktemp("mixed")
    return [save(adapted(seed=i, **settings), root / f"step-{i}") for i, settings in enumerate(MIXED)]


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return three adapters of one rank and one scaling."""
    root = tmp_path_factory.mktemp("alike")
    return [save(adapted(seed=i), root / f"step-{i}") for i in range(3)]


def dense(paths: list[str], a: list[float]) -> dict[str, torch.Tensor]:
    return weighted([updates(load(path)) for path in paths], a)


def data_bytes(paths: list[str]) -> int:
    return sum(t.nbytes for path in paths for t in load_file(f"{path}/adapter_model.safetensors").values())


def test_products_are_averaged_exactly(mixed: list[str], tmp_path: Path) -> None:
    average_fixed(mixed, tmp_path / "out", A, space="product")
    result = load(tmp_path / "out")
    expected, actual = dense(mixed, A), updates(result)
    assert expected.keys() == actual.keys() and len(actual) == 3
    for name, update in expected.items():
        torch.testing.assert_close(actual[name], update, rtol=1e-6, atol=1e-6 * float(update.abs().max()))
    norms = [
        load_file(f"{path}/adapter_model.safetensors")["base_model.model.transformer.ln_f.weight"] for path in mixed
    ]
    saved = result.base_model.model.transformer.ln_f.modules_to_save["default"].weight
    torch.testing.assert_close(saved.data, weighted([{"w": n} for n in norms], A)["w"].float())
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (12, 12, False)
    assert list(written["rank_pattern"].values()) == [13]


@pytest.mark.parametrize("rank", [None, 3])
def test_products_of_stacked_experts(rank: int | None, tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{"r": 2}, {"r": 3, "lora_alpha": 5}]
    models = [adapters.experts(i, target_modules=["q_proj"], **first) for i, first in enumerate(settings)]
    paths = [save(model, tmp_path / f"{i}") for i, model in enumerate(models)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        average_fixed(paths, tmp_path / "out", [0.3, 0.7], space="product", rank=rank)
    expected = weighted([updates(load(path, base=adapters.mixture)) for path in paths], [0.3, 0.7])
    for name, update in updates(load(tmp_path / "out", base=adapters.mixture)).items():
        values = np.linalg.svd(expected[name].numpy(), compute_uv=False)
        left_out = float(np.sqrt((values[..., rank or 5 :] ** 2).sum()))
        assert float((update - expected[name]).norm()) == pytest.approx(left_out, rel=1e-5, abs=1e-6)
    assert any(update.dim() == 3 for update in expected.values())


def test_products_are_those_of_peft(alike: list[str], tmp_path: Path) -> None:
    """`cat` is exact. `linear` takes roots of weights, so that n equal adapters give n times their update."""
    average_fixed(alike, tmp_path / "out", [0.5, 0.25, 0.25], space="product")
    with pytest.warns(TwaWarning, match="count 2 times"):
        average_fixed(alike[:1] * 2, tmp_path / "same", space="factors")
    model = load(alike[0])
    for i in (1, 2):
        model.load_adapter(alike[i], f"{i}")
    model.add_weighted_adapter(["default", "1", "2"], [0.5, 0.25, 0.25], "cat", combination_type="cat")
    model.add_weighted_adapter(["default", "default"], [0.5, 0.5], "linear", combination_type="linear")
    for path, name, times in ((tmp_path / "out", "cat", 1), (tmp_path / "same", "linear", 2)):
        for module, update in updates(load(path)).items():
            torch.testing.assert_close(updates(model, name)[module], times * update, rtol=1e-4, atol=1e-7)


def test_a_rank_truncates_as_numpy_does(mixed: list[str], tmp_path: Path) -> None:
    with pytest.warns(TwaWarning, match="rank 5: the products differ") as messages:
        average_fixed(mixed, tmp_path / "out", A, space="product", rank=5)
    expected, actual = dense(mixed, A), updates(load(tmp_path / "out"))
    left_out = total = 0.0
    for name, update in expected.items():
        values = np.linalg.svd(update.numpy(), compute_uv=False)
        assert float((actual[name] - update).norm()) == pytest.approx(np.sqrt((values[5:] ** 2).sum()), rel=1e-5)
        left_out, total = left_out + (values[5:] ** 2).sum(), total + (values**2).sum()
    assert f"by {np.sqrt(left_out / total):.3g} of its norm" in str(messages[0].message)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == 5


def test_bfloat16_adapters_stay_bfloat16(tmp_path: Path) -> None:
    paths = [save(adapted(seed=i, lora_alpha=8 + i).to(torch.bfloat16), tmp_path / f"{i}") for i in range(2)]
    for space in ("product", "factors"):
        average_fixed(paths, tmp_path / space, space=space)
        tensors = load_file(tmp_path / space / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_factors_take_other_scalings_into_account(tmp_path: Path) -> None:
    """The average of one candidate alone has the update of that candidate, for any scaling."""
    settings: list[dict[str, Any]] = [{"lora_alpha": 3, "use_rslora": True}, {"lora_bias": False}]
    paths = [save(adapted(seed=i, **first), tmp_path / f"{i}") for i, first in enumerate(settings)]
    average_fixed(paths, tmp_path / "out", [1.0, 0.0], space="factors")
    for name, update in updates(load(paths[0])).items():
        torch.testing.assert_close(updates(load(tmp_path / "out"))[name], update, rtol=1e-5, atol=1e-7)


def test_factors_of_one_scaling_are_averaged_one_by_one(alike: list[str], tmp_path: Path) -> None:
    with pytest.warns(TwaWarning, match=r"A and B one by one.*--space product"):
        average_fixed(alike, tmp_path / "out", A)
    stored = [load_file(f"{path}/adapter_model.safetensors") for path in alike]
    for name, tensor in load_file(tmp_path / "out/adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, weighted(stored, A)[name], rtol=1e-6, atol=1e-7)


def test_slices_of_concatenated_factors(mixed: list[str]) -> None:
    """Slices within and across rows of tensors that no file contains."""
    for candidate, path in zip(open_candidates(mixed, wanted=Wanted(space="product")), mixed, strict=True):
        nonzero = 0
        for name in candidate.names():
            numel = prod(candidate.shape(name))
            whole = torch.empty(numel, dtype=candidate.dtype(name))
            candidate.read(name, 0, whole)
            parts = sorted({0, numel, *torch.randint(numel, (9,), generator=torch.Generator().manual_seed(1)).tolist()})
            for start, stop in [*pairwise(parts), (parts[1], parts[-2])]:
                part = torch.empty(stop - start, dtype=whole.dtype)
                candidate.read(name, start, part)
                assert torch.equal(part, whole[start:stop])
            nonzero += int((whole != 0).sum())
        assert nonzero == data_bytes([path]) // 4
        candidate.close()


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ([{"use_dora": True, "target_modules": ["c_attn"]}] * 2, r"adapter_config.json: .*DoRA \(use_dora\)"),
        ([{}, {"init_lora_weights": "pissa"}], "init_lora_weights is 'pissa'"),
        ([IA3Config(target_modules=["c_attn"], feedforward_modules=[])] * 2, "IA3 adapters have no product"),
        ([LoHaConfig(target_modules=["lm_head"])] * 2, "LOHA adapters have no product"),
    ],
)
def test_candidates_without_products(settings: list[Any], rule: str, tmp_path: Path) -> None:
    models = [adapted(seed=i, **s) if isinstance(s, dict) else adapted(s, seed=i) for i, s in enumerate(settings)]
    paths = [save(model, tmp_path / f"{i}") for i, model in enumerate(models)]
    with pytest.raises(TwaError, match=rf"{rule}.*--space factors"):
        average_fixed(paths, tmp_path / "out", space="product")
    assert not (tmp_path / "out").exists()


def test_plain_weights_have_no_products(tmp_path: Path) -> None:
    for i in range(2):
        save_file({"w": torch.ones(3)}, tmp_path / f"{i}.safetensors")
    with pytest.raises(TwaError, match=r"space: product needs LoRA adapters.*adapter_config\.json"):
        average_fixed([str(tmp_path / f"{i}.safetensors") for i in range(2)], tmp_path / "out", space="product")


def test_adapters_of_different_ranks_need_space_product(mixed: list[str], tmp_path: Path) -> None:
    with pytest.raises(TwaError, match=r"have rank 4, those of .* 2\..*--space product"):
        average_fixed(mixed, tmp_path / "out")
    with pytest.raises(TwaError, match="only products can be truncated"):
        average_fixed(mixed[:1], tmp_path / "out", rank=2)


def test_an_adapter_is_not_averaged_with_a_model(alike: list[str], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    save_file(adapters.base().transformer.state_dict(), tmp_path / "full/model.safetensors")
    with pytest.raises(TwaError, match=r"is an adapter of PEFT, but .*full has no adapter_config.json"):
        average_fixed([alike[0], str(tmp_path / "full")], tmp_path / "out")


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"lora_alpha": "16"}, "lora_alpha of .* is '16'; it has to be a finite number"),
        ({"r": 0}, "the rank of .* is 0; it has to be an integer"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\]; it has to be a mapping"),
        ({"alpha_pattern": {"(": 1}}, "'\\(' is not a regular expression"),
        (None, "is not JSON"),
    ],
)
def test_invalid_configurations_raise(
    changed: Mapping[str, Any] | None, rule: str, alike: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "odd"
    path.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (path / name).write_bytes((Path(alike[0]) / name).read_bytes())
    settings = json.loads((path / "adapter_config.json").read_text()) | (changed or {})
    (path / "adapter_config.json").write_text("{" if changed is None else json.dumps(settings))
    with pytest.raises(TwaError, match=f"odd.adapter_config.json: .*{rule}"):
        average_fixed([str(path), *alike], tmp_path / "out", space="product")


def test_attach_to_the_factors(alike: list[str], tmp_path: Path) -> None:
    model = load(alike[-1], trainable=True)
    before = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    with pytest.warns(TwaWarning, match=KEPT):
        twa = twa_scale.attach(model, alike, {"groups": "block", "space": "factors"})
    assert twa.bytes_read == data_bytes(alike)
    model(adapters.IDS, labels=adapters.IDS).loss.backward()
    twa.step()
    twa.export(tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    assert not torch.equal(logits(model), logits(load(alike[-1])))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    with twa.weights(A):
        stored = [load_file(f"{path}/adapter_model.safetensors") for path in alike]
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items():
            torch.testing.assert_close(tensor, weighted(stored, A)[name], rtol=1e-5, atol=1e-6)


def test_attach_to_the_products(mixed: list[str], tmp_path: Path) -> None:
    """The live model is linear in the coefficients. Their gradient is that of the dense sum."""
    average_fixed(mixed, tmp_path / "start", space="product")
    model = load(tmp_path / "start", trainable=True)
    with pytest.warns(TwaWarning, match=KEPT):
        twa = twa_scale.attach(model, mixed, {"space": "product", "groups": "tensor"})
    assert twa.bytes_read == data_bytes(mixed)
    with twa.weights(A):
        expected = dense(mixed, A)
        twa.export(tmp_path / "shown")
    for name, update in updates(load(tmp_path / "shown")).items():
        torch.testing.assert_close(update, expected[name], rtol=1e-5, atol=1e-6 * float(expected[name].abs().max()))
    for _ in range(2):
        model(adapters.IDS, labels=adapters.IDS).loss.backward()
        twa.step()
    assert all("lora_A" not in group and "lora_embedding_A" not in group for group in twa.layout.groups)
    twa.export(tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    save_run(twa, mixed, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "exact")
    torch.testing.assert_close(logits(load(tmp_path / "exact")), logits(model), rtol=1e-5, atol=1e-5)


def test_gradients_of_products(mixed: list[str], tmp_path: Path) -> None:
    average_fixed(mixed, tmp_path / "start", space="product")
    model = load(tmp_path / "start", trainable=True)
    config = {"space": "product", "units": "weight", "optimizer": {"name": "sgd", "lr": 1e-3}}
    with pytest.warns(TwaWarning, match=KEPT):
        twa = twa_scale.attach(model, mixed, config)
    losses = []
    for a in ([1 / 3 + 1e-3, 1 / 3 - 1e-3, 1 / 3], [1 / 3 - 1e-3, 1 / 3 + 1e-3, 1 / 3]):
        with twa.weights(a):
            losses.append(model.eval()(adapters.IDS, labels=adapters.IDS).loss.item())
    model(adapters.IDS, labels=adapters.IDS).loss.backward()
    before = twa.coefficients[:, 0].clone()
    twa.step()
    moved = twa.coefficients[:, 0] - before
    slope = (losses[0] - losses[1]) / 2e-3
    assert float(moved[0] - moved[1]) * slope < 0


@pytest.mark.parametrize(
    "config",
    [
        VeraConfig(r=8, target_modules=["lm_head"]),
        LoraConfig(r=4, use_dora=True, target_modules=["c_attn"], fan_in_fan_out=True),
        IA3Config(target_modules=["c_attn", "mlp.c_fc"], feedforward_modules=["mlp.c_fc"], fan_in_fan_out=True),
    ],
    ids=["VeRA", "DoRA", "IA3"],
)
def test_other_adapters_are_averaged_tensor_by_tensor(config: Any, tmp_path: Path) -> None:
    paths = [save(adapted(config, seed=i), tmp_path / f"{i}") for i in range(3)]
    model = load(paths[-1], trainable=True)
    with pytest.warns(TwaWarning, match=KEPT):
        twa = twa_scale.attach(model, paths, {"space": "factors"})
    assert twa.bytes_read == data_bytes(paths)
    model(adapters.IDS, labels=adapters.IDS).loss.backward()
    twa.step()
    twa.export(tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_state_dicts_with_the_name_of_the_adapter(alike: list[str]) -> None:
    model = load(alike[-1], trainable=True)
    names = {name for name, p in model.named_parameters() if "lora_" in name}
    states = [{name: value for name, value in load(path).state_dict().items() if name in names} for path in alike]
    assert any(name.endswith("lora_A.default.weight") for name in names)
    with pytest.warns(TwaWarning, match=KEPT), pytest.warns(TwaWarning, match="factors of low-rank updates"):
        twa = twa_scale.attach(model, states)
    with twa.weights(0):
        torch.testing.assert_close(logits(model), logits(load(alike[0])), rtol=1e-5, atol=1e-5)


def test_live_adapters_that_do_not_fit(alike: list[str], mixed: list[str], tmp_path: Path) -> None:
    with pytest.raises(TwaError, match=r"nothing to train.*is_trainable=True"):
        twa_scale.attach(load(alike[-1]), alike, {"space": "factors"})
    other = adapted(lora_alpha=4)
    with pytest.raises(TwaError, match=r"scaled by 2 in .*step-2, but by 1 in the model"):
        twa_scale.attach(other, alike, {"space": "factors"})
    with pytest.raises(TwaError, match=r"ranks of the candidates add up to 12 in .* has rank 4"):
        twa_scale.attach(adapted(modules_to_save=["ln_f"]), mixed, {"space": "product"})
    merged = load(alike[-1], trainable=True)
    merged.merge_adapter()
    with pytest.raises(TwaError, match="unmerge_adapter"):
        twa_scale.attach(merged, alike)
    two = load(alike[-1], trainable=True)
    two.load_adapter(alike[0], "second")
    two.base_model.set_adapter(["default", "second"])
    with pytest.raises(TwaError, match="2 active adapters"):
        twa_scale.attach(two, alike)
    prompts = adapted(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(TwaError, match=r"PROMPT_TUNING.*twa-scale average"):
        twa_scale.attach(prompts, alike)


def test_tensors_of_the_adapter_must_not_be_missing(alike: list[str], tmp_path: Path) -> None:
    wider = adapted(target_modules=["c_attn", "wte", "c_proj"])
    with pytest.raises(TwaError, match=r"c_proj.lora_A.*missing.*`missing: keep`"):
        twa_scale.attach(wider, alike, {"space": "factors"})


class Two(nn.Module):
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        self.register_buffer("scale", torch.ones(2))
        self.codes = nn.Parameter(torch.arange(2, dtype=torch.uint8), requires_grad=False)  # as with a quantized base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.body(x))
        return y * self.scale * self.codes


def test_missing_tensors_keep_their_value_if_requested(tmp_path: Path) -> None:
    model = Two()
    states = [{f"body.{k}": v.detach().clone() for k, v in nn.Linear(3, 3).named_parameters()} for _ in range(2)]
    with pytest.raises(TwaError, match=r"'codes' of the model is missing.*'head.weight'.*`missing: keep`"):
        twa_scale.attach(model, states)
    head = model.head.weight.detach().clone()
    with pytest.warns(TwaWarning, match=r"4 tensors of the model \('codes', .*keep the value .* they lack these"):
        twa = twa_scale.attach(model, states, {"missing": "keep"})
    model(torch.ones(1, 3)).sum().backward()
    twa.step()
    assert torch.equal(model.head.weight, head)
    twa.export(tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors").keys() == states[0].keys()


def test_inspect_compares_products(mixed: list[str]) -> None:
    actual = inspect(mixed, wanted=Wanted(space="product"))
    extra = [load_file(f"{path}/adapter_model.safetensors") for path in mixed]
    flat = []
    for path, tensors in zip(mixed, extra, strict=True):
        others = [t.double().flatten() for name, t in sorted(tensors.items()) if "lora_" not in name]
        flat.append(torch.cat([*(u.flatten() for u in updates(load(path)).values()), *others]))
    assert actual.norms == pytest.approx([float(w.norm()) for w in flat], rel=1e-6)
    mean = sum(flat) / 3
    assert actual.delta_norms == pytest.approx([float((w - mean).norm()) for w in flat], rel=1e-6)
    assert actual.distances[0, 2] == pytest.approx(float((flat[0] - flat[2]).norm()), rel=1e-6)
    assert actual.elements == [data_bytes([path]) // 4 for path in mixed]
    assert actual.adapters[::2] == ["LORA, rank 4, scaling 2", "LORA, rank 2 to 3, scaling 2.67 to 4"]
    assert list(inspection_table(actual).columns[-1].cells) == actual.adapters
