"""Checkpoints that Megatron-core and NeMo write, and averages of them that these libraries load."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("nemo"), reason="NeMo is not installed; train_nemo.py says how")
def test_nemo_loads_the_average_of_its_checkpoints(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.integrations.train_nemo", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("megatron"),
    reason="the extra dev has megatron-core, on Linux only",
)
def test_megatron_resumes_from_the_average(tmp_path: Path) -> None:
    code = "import sys; from tests.integrations.train_megatron import main; main(sys.argv[1])"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
