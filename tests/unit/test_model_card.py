"""README.md of outputs: its metadata for the hub, and the card of a candidate."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import twa_scale
from twa_scale.merge import average_fixed
from twa_scale.output.model_card import SNAPSHOT_LABEL, with_card
from twa_scale.output.provenance import provenance

huggingface_hub = pytest.importorskip("huggingface_hub")
LLAMA = {"architectures": ["LlamaForCausalLM"], "_name_or_path": "acme/tiny-llama", "dtype": "float32"}
CARD = "---\nlicense: mit  # ours\ntags:\n- chat\n---\n\n# My model\n\nText.\n"


def origin(*candidates: str, **more: Any) -> dict[str, Any]:
    return provenance("an average with fixed weights", candidates or ["runs/a/x-1", "runs/a/x-2"], **more)


def card_of(files: dict[str, bytes], of: dict[str, Any]) -> Any:
    """Return the card as the library of the hub reads it."""
    card = huggingface_hub.ModelCard(with_card(files, of)["README.md"].decode())
    assert isinstance(card.data, huggingface_hub.ModelCardData)
    return card


def config(**changes: Any) -> dict[str, bytes]:
    return {"config.json": json.dumps(LLAMA | changes).encode()}


def test_a_new_card() -> None:
    card = card_of(config(), origin(weights=[1.25, -0.25]))
    assert card.data.base_model == "acme/tiny-llama" and card.data.library_name == "transformers"
    assert "merge" in card.data.tags
    assert "| <code>x-1</code> | 1.25 |" in card.text and "| <code>x-2</code> | -0.25 |" in card.text
    assert "twa-scale average x-1:1.25 \\\n  x-2:-0.25" in card.text


def test_coefficients_of_groups_are_summed_up() -> None:
    settings = {"groups": "tensor", "basis": "normalized", "center": "mean"}
    of = origin(config=settings, groups=["a", "b"], elements=[3, 1], coefficients=[[0.5, 1.5], [0.5, -0.5]], step=7)
    text = card_of(config(), of).text
    assert "| <code>x-1</code> | 0.75 | 0.5 | 1.5 |" in text and "2 groups of tensors, of step 7" in text
    assert "twa-scale export RUN" in text and "twa-scale average" not in text


@pytest.mark.parametrize(
    ("name", "known"),
    [("acme/tiny-llama", True), ("/home/me/llama", False), ("llama", False), ("..", False), ("a/b/c", False),
     ("here/base", False), ("a/b--c", False), (3, False), ("../b/c", False)],
)  # fmt: skip
def test_only_names_on_the_hub_are_base_models(
    name: Any, known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here/base").mkdir(parents=True)
    actual = card_of(config(_name_or_path=name), origin(weights=[0.5, 0.5])).data.base_model
    assert actual == (name if known else None)
    if known:
        huggingface_hub.utils.validate_repo_id(actual)


def test_candidates_from_the_hub_and_adapters() -> None:
    cache = "/cache/hub/models--acme--{}/snapshots/0a1b"
    data = card_of(config(), origin(cache.format("one"), cache.format("two"), weights=[0.5, 0.5])).data
    assert data.base_model == ["acme/one", "acme/two"] and data.base_model_relation == "merge"
    adapter = {"adapter_config.json": b'{"base_model_name_or_path": "acme/base"}'}
    data = card_of(adapter, origin(weights=[0.5, 0.5])).data
    assert data.base_model == "acme/base" and data.library_name == "peft"


def test_names_in_model_cards_are_escaped() -> None:
    bad = "<script>`|[x](y)*_$-1"
    text = card_of(config(), origin(f"a/{bad}", "a/b\n| c |", weights=[0.5, 0.5])).text
    assert "<script>" not in text.split("```sh")[0] and "`|" not in text
    assert sum(line.startswith("| ") for line in text.splitlines()) == 4  # header, rule and two candidates


def test_the_card_of_a_candidate_is_kept() -> None:
    files = {**config(), "README.md": CARD.encode()}
    first = with_card(files, origin(weights=[0.5, 0.5]))
    text = first["README.md"].decode()
    assert text.startswith(CARD.rstrip()) and "those of the last checkpoint" in text
    card = huggingface_hub.ModelCard(text)
    assert card.data.license == "mit" and card.data.tags == ["chat"]
    repeated = with_card(first, origin("z-1", weights=[1.0]))["README.md"].decode()  # an average of averages
    assert repeated.startswith(CARD.rstrip()) and repeated.count("twa_scale: begin") == 1
    assert "z-1" in repeated and "x-1" not in repeated


def test_generated_card_is_replaced() -> None:
    first = with_card(config(), origin(weights=[0.5, 0.5]))
    repeated = huggingface_hub.ModelCard(with_card(first, origin("z-1", weights=[1.0]))["README.md"].decode())
    assert repeated.data.base_model == "acme/tiny-llama" and "z-1" in repeated.text and "x-1" not in repeated.text
    assert "# Average of 1 checkpoint\n" in repeated.text and "last checkpoint" not in repeated.text


def test_weights_of_any_kind_have_a_card() -> None:
    card = card_of({}, origin(weights=[0.5, 0.5]))
    assert card.data.tags == ["merge", "weight-averaging", "twa_scale"] and card.data.library_name is None
    text = with_card({"README.md": b"mine"}, origin(weights=[0.5, 0.5]))["README.md"].decode()
    assert text.startswith("mine\n") and "x-1" in text


def test_invalid_card_is_kept() -> None:
    files = {"config.json": b"{", "README.md": b"\xff\xfe"}
    assert with_card(files, origin(weights=[0.5, 0.5])) == files


def test_cards_of_running_averages_have_the_settings() -> None:
    ema = {"decay": [0.5], "half_life": 0.1, "bema": True, "use_buffers": True, "start_step": 3}
    averages = twa_scale.RunningAverages(torch.nn.Linear(1, 1), ema=ema, window={"every": 1, "keep": 2})
    for _ in range(4):
        averages.step()
    shared = {"updates": 2, "update_every": 1, "start_step": 3, "bias_correction": False, "use_buffers": True}
    own = {
        "ema:0.5": ("decay", 0.5, ", decay 0.5"),
        "ema:half-life:0.1": ("half_life", 0.1, ", half-life 0.1"),
        "bema": ("bema", {"ema_power": 0.5, "bias_power": 0.2, "lag": 10.0, "multiplier": 1.0}, ""),
    }
    for name, (key, value, messages) in own.items():
        of = averages.origin(name)
        assert of["ema"] == {**shared, key: value}
        card = card_of(config(), of)
        kind = "a bias-corrected exponential" if key == "bema" else "an exponential"
        assert "# Running average of a training\n" in card.text and "has the settings.\n" in card.text
        assert f"The weights are {kind} average (<code>{name}</code>{messages}) at step 4. twa_scale " in card.text
        assert card.data.tags == ["weight-averaging", "twa_scale"] and "| " not in card.text
    last = card_of(config(), averages.origin("last"))
    assert "The weights are the trained weights at step 4. twa_scale" in last.text and last.data.tags == ["twa_scale"]
    assert "twa_scale.json" not in last.text
    window = averages.origin("mean")
    assert window["window"] == {"every": 1, "keep": 2, "store": "packed1", "start_step": 0}
    text = card_of(config(), window).text
    assert "The coefficients are fixed: <code>mean</code>." in text and "has all coefficients and settings." in text
    assert f"| <code>{SNAPSHOT_LABEL}3</code> | 0.5 |" in text and "twa-scale average" not in text


@pytest.mark.parametrize("form", ["hf", "pt", "same"])
def test_outputs_have_a_model_card_and_can_be_replaced(tmp_path: Path, form: str) -> None:
    for i in (1, 2):
        (tmp_path / f"step-{i}").mkdir()
        (tmp_path / f"step-{i}/config.json").write_text(json.dumps(LLAMA))
        save_file({"a": torch.full((2,), float(i))}, tmp_path / f"step-{i}/model.safetensors")
    for _ in range(2):
        average_fixed([str(tmp_path / "step-*")], tmp_path / "out", format=form, overwrite=True)
    card = huggingface_hub.ModelCard.load(tmp_path / "out/README.md")
    assert card.data.base_model == "acme/tiny-llama"
    files = json.loads((tmp_path / "out/twa_scale.json").read_text())["files"]
    assert "README.md" in files
