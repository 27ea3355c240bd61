"""`task.adapter`: runs whose candidates are adapters of PEFT."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import twa_scale
from tests import adapters
from tests.commands.small_runs import load, run_here, settings
from tests.pool import Pool
from twa_scale.average.state import load_state
from twa_scale.config import RunConfig, TaskConfig, validated
from twa_scale.run.tasks import build_task
from twa_scale.tools.planning import make_plan

LORA = {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}


@pytest.fixture
def run_settings(tmp_path: Path) -> dict[str, Any]:
    """Return the settings of a run with three adapters of a GPT-2."""
    adapters.base().save_pretrained(tmp_path / "base")
    paths = [adapters.save(adapters.adapted(seed=i, **LORA), tmp_path / f"lora-{i}") for i in range(3)]
    tokens = {}
    for split in ("train", "validation"):
        tokens[split] = str(tmp_path / f"{split}.bin")
        (np.arange(13 * 24) % 7).astype(np.uint16).tofile(tokens[split])
    task = {"name": "causal_lm", "model": str(tmp_path / "base"), "adapter": paths[0], "tokens": tokens, "context": 12}
    return settings(str(tmp_path / "lora-*"), task, tmp_path / "out", space="factors")


@pytest.mark.parametrize("engine", ["plain", "fsdp2", "zero3"])
@pytest.mark.filterwarnings("ignore:the base model keeps")
def test_a_run_averages_adapters(run_settings: dict[str, Any], ranks: Pool, tmp_path: Path, engine: str) -> None:
    """The base model has its own weights, and PEFT loads the export. Candidates can be named as files."""
    changes = {"engine": engine}
    if engine == "zero3":
        changes["candidates"] = str(tmp_path / "lora-*" / "adapter_model.safetensors")
    ranks(run_here, 1 if engine == "plain" else 2, data=run_settings | changes, timeout=120)
    output = tmp_path / "out"
    coefficients = load_state(output).exported.coefficients
    assert (coefficients - 1 / 3).abs().max() > 1e-3
    exported, first = load(output / "average"), load(tmp_path / "lora-0")
    assert exported.keys() == first.keys()
    loaded = adapters.load(output / "average")
    tokens = torch.arange(12 * 2).view(2, 12) % 7
    with torch.no_grad():
        assert float(loaded(tokens, labels=tokens).loss) < float(adapters.base()(tokens, labels=tokens).loss)


@pytest.mark.filterwarnings("ignore")
def test_a_run_with_adapters_is_planned(run_settings: dict[str, Any]) -> None:
    estimate = make_plan(validated(RunConfig, run_settings | {"engine": "plain"}), 1)
    assert estimate.step["activations"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "nowhere"}, "'nowhere' has no adapter_config.json"),
        ({"model": "byte_gpt"}, "`adapter` is for a Hugging Face model"),
        ({"adapter": None}, r"set task\.adapter to one of the candidates"),
    ],
)
def test_wrong_settings_are_refused(run_settings: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    task = run_settings["task"] | changes
    with pytest.raises(twa_scale.TwaError, match=message):
        run_here(run_settings | {"task": task})


def test_an_adapter_of_another_model_is_named(run_settings: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "lora-0" / "adapter_config.json"
    config.write_text(config.read_text().replace("c_attn", "q_proj"))
    with pytest.raises(twa_scale.ConfigError, match=r"task\.adapter: .*lora-0' does not fit .*base'"):
        run_here(run_settings)


def test_documents_are_isolated_in_a_model_with_an_adapter(run_settings: dict[str, Any]) -> None:
    isolated = {"documents": "packed", "isolate_documents": True, "document_end": 0}
    model: Any = build_task(validated(TaskConfig, run_settings["task"] | isolated)).model()
    assert model.get_base_model().transformer.wte.weight.shape == (40, 32)
