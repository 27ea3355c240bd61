"""Memory of 57 M parameters, 8 candidates and two ranks of FSDP2 or ZeRO-3, measured in separate processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from twa_scale.run.tasks.byte_gpt import ByteGPT
from twa_scale.run.tasks.causal_lm import ByteGPTSizes

CANDIDATES, RANKS = 8, 2
SIZES = ByteGPTSizes(n_layer=8, n_head=12, d_model=768)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write candidates with random weights and a config of three steps. Memory does not depend on the values."""
    root = tmp_path_factory.mktemp("scale")
    torch.manual_seed(0)
    base = ByteGPT(64, SIZES.n_layer, SIZES.n_head, SIZES.d_model).state_dict()
    for i in range(CANDIDATES):
        directory = root / "candidates" / f"step-{i}"
        directory.mkdir(parents=True)
        save_file({k: v + 2e-3 * torch.randn_like(v) for k, v in base.items()}, directory / "model.safetensors")
    settings = {
        "candidates": str(root / "candidates" / "step-*"),
        "output": str(root / "run"),
        "task": {"name": "causal_lm", "model": {"byte_gpt": SIZES.model_dump()}, "text": "stdlib", "context": 64},
        "groups": "block",
        "steps": 3,
        "batch_size": 4,
        "evaluate_batches": 1,
    }
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_memory_and_bytes_match_plan(config: Path, engine: str) -> None:
    """The peak resident memory of each rank is within 10 %. One rank reads every byte of every candidate once."""
    command = [sys.executable, "-m", "twa_scale", "plan", str(config), f"engine={engine}", f"--ranks={RANKS}", "--json"]
    plan = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    subprocess.run(
        [*launcher, "-m", "twa_scale", "run", str(config), f"engine={engine}", "resume=false"],
        check=True,
        env=environment,
    )
    summary = json.loads((config.parent / "run" / "summary.json").read_text())

    files = sum(f.stat().st_size for f in (config.parent / "candidates").glob("*/model.safetensors"))
    elements = plan["trained_elements"]
    assert elements > 50e6
    assert sum(summary["bytes_read_per_rank"]) == 4 * elements * CANDIDATES <= files
    assert max(summary["bytes_read_per_rank"]) == plan["bytes_read"]
    print(f"plan {plan['peak'] / 1e9:.2f} GB, measured {[p / 1e9 for p in summary['peak_resident_bytes_per_rank']]}")
    for peak in summary["peak_resident_bytes_per_rank"]:
        assert abs(peak - plan["peak"]) < 0.1 * plan["peak"], (peak, plan)
    # The whole basis would need this much memory on each rank. All ranks are far below it.
    data = max(summary["peak_resident_bytes_per_rank"]) - plan["memory"]["python and libraries"]
    assert data < 4 * elements * CANDIDATES + 4 * elements
