"""The programs of the examples on a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


def test_the_proof(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.proof.run", "--task=language", "--size=tiny", "--seeds=0"]
    options = ["--device=cuda", f"--out={tmp_path}", f"--packages={tmp_path}"]
    done = subprocess.run([*command, *options], check=True, cwd=ROOT, capture_output=True, text=True)
    assert "Finished seeds: 0." in done.stdout


def test_the_quickstart(tmp_path: Path) -> None:
    options = ["--device=cuda", f"--out={tmp_path}", "--steps=10", "--extra=2", "--batches=1"]
    subprocess.run([sys.executable, ROOT / "examples/quickstart/run.py", *options], check=True, cwd=ROOT)
    assert (tmp_path / "twa-packed4" / "coefficients.png").exists()
