"""Averages in Axolotl, with its command. Skipped without `axolotl`, which `make setup` does not install."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

pytest.importorskip("axolotl")

from examples.trl.train import functions, write_start
from tests.integrations.test_trl import same, weights_in

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STEPS, HALF, DECAY, MODULES = 4, 2, 0.5, 6
TWA = {
    "ema": [DECAY],
    "window": {"every": 1, "keep": 3},
    "evaluate_also": ["last"],
    "learn": {"groups": "block"},
    "learn_steps": 2,
}


def train(
    directory: Path, twa: dict[str, Any] | None, ranks: int = 1, **settings: Any
) -> subprocess.CompletedProcess[str]:
    """Run Axolotl's command in a directory, with torchrun on several ranks."""
    several = ranks > 1
    config = {
        "base_model": "start",
        "datasets": [{"path": "data.jsonl", "ds_type": "json", "type": "completion", "field": "text"}],
        "val_set_size": 0.1,
        "sequence_len": 96,
        "micro_batch_size": 4 // ranks,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "save_steps": 1,
        "eval_steps": HALF,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "bf16": False,
        "fp16": False,
        "attn_implementation": "eager",
        "output_dir": "out",
        "plugins": [
            *(["tests.integrations.axolotl_on_cpu.OnCpu"] if several else []),
            "twa_scale.integrations.axolotl.TwaPlugin",
        ],
        "twa": twa,
        **settings,
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if several else []
    command = [sys.executable, *torchrun, "-m", "axolotl.cli.train", "config.yaml"]
    return subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=900)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_start(tmp_path / "start", MODULES)
    lines = [json.dumps({"text": line + text}) for line, text in functions(MODULES)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize("ranks", [1, 2])
def test_axolotl_keeps_averages_learns_and_resumes(ranks: int, folder: Path) -> None:
    done = train(folder, TWA, ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    out = folder / "out"
    steps = [weights_in(out / f"checkpoint-{step + 1}") for step in range(STEPS)]
    average = steps[0]
    for weights in steps[1:]:
        average = {name: DECAY * average[name] + (1 - DECAY) * weights[name] for name in average}
    ema = weights_in(out / f"checkpoint-{STEPS}/average")
    assert all(ema[name].sub(value).abs().max() < 1e-6 for name, value in average.items())
    log = json.loads((out / f"checkpoint-{STEPS}/trainer_state.json").read_text())["log_history"]
    assert {"eval_loss", "eval_last_loss"} <= {name for entry in log for name in entry}
    learned = load_file(out / "average/model.safetensors")
    assert len(json.loads((out / "average/twa_scale.json").read_text())["candidates"]) == 3
    assert len(list((out / f"checkpoint-{STEPS}").glob("averages-*"))) == ranks
    done = train(folder, TWA, ranks, resume_from_checkpoint=f"out/checkpoint-{HALF}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert same(weights_in(out / f"checkpoint-{STEPS}/average"), ema)
    assert same(load_file(out / "average/model.safetensors"), learned)


@pytest.mark.parametrize(("twa", "message"), [({"emas": [0.9]}, "twa.emas"), (None, "twa: the plugin TwaPlugin needs")])
def test_a_wrong_setting_is_named(twa: dict[str, Any] | None, message: str, folder: Path) -> None:
    done = train(folder, twa)
    assert done.returncode != 0 and message in done.stderr + done.stdout
    assert not (folder / "out").exists() or not list((folder / "out").glob("checkpoint-*"))
