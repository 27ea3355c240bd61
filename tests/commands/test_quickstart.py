"""All programs of the quickstart at a small size, on its text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_quickstart(tmp_path: Path) -> None:
    command = [ROOT / "examples/quickstart/run.py", f"--out={tmp_path}", "--steps=10", "--extra=2", "--batches=1"]
    forked = [sys.executable, "-m", "tests.forked_programs", *map(str, command)]
    subprocess.run(forked, check=True, cwd=ROOT)
    methods = {path.name: load_file(path / "model.safetensors") for path in (tmp_path / "methods").iterdir()}
    candidates = [load_file(path / "model.safetensors") for path in sorted((tmp_path / "candidates").iterdir())]
    assert len(candidates) == 2
    for name, last in methods["last"].items():
        torch.testing.assert_close(last, candidates[-1][name], rtol=1e-6, atol=1e-7)
        mean = torch.stack([candidate[name].double() for candidate in candidates]).mean(0)
        torch.testing.assert_close(methods["uniform"][name].double(), mean, rtol=1e-6, atol=1e-6)
        others = ("twa", "annealed", "decayed")
        assert all(not torch.equal(methods[other][name], last) for other in others), name
        assert not torch.equal(methods["twa-annealed"][name], methods["twa"][name]), name
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["steps"] for row in rows] == [10, 10, 10, 12, 12, 14, 14, 14]
    assert all(1 < row["loss"] < 5.6 for row in rows)  # log 256 = 5.55
    assert (tmp_path / "twa-packed4" / "coefficients.png").exists()


@pytest.mark.slow
def test_the_trainings_on_one_rank(tmp_path: Path) -> None:
    """As on a machine with one GPU: there is no process group."""
    command = [ROOT / "examples/quickstart/train.py", ROOT / "configs/quickstart.yaml", "device=cpu"]
    command += [f"--out={tmp_path}", "--steps=10", "--extra=1", "--keep=8", "--every=5", "--batches=1"]
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)
    expected = {"annealed", "decayed", "ema", "last", "twa", "twa-annealed", "uniform"}
    assert {path.name for path in (tmp_path / "methods").iterdir()} == expected
