"""Trainers of other libraries that are killed at random moments resume with the bits of an undisturbed training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.chaos
def test_trainers_are_killed_and_resume(tmp_path: Path, chaos_seed: int) -> None:
    command = [sys.executable, "-m", "tests.chaos.killed_trainings", str(tmp_path), str(chaos_seed)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"\nseed {chaos_seed}: {', '.join(done.stdout.strip().splitlines())}")
