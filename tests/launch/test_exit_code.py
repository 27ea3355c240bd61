"""A rank exits with its own exit code although threads still run."""

import os
import subprocess
import sys
from pathlib import Path

RANK = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}


def test_threads_of_gloo_do_not_change_the_exit_code(tmp_path: Path) -> None:
    """With `sys.exit` instead of `exit_process` many such ranks abort, so eight are started."""
    command = [sys.executable, "-m", "tests.launch.exiting_ranks", str(tmp_path)]
    ended = subprocess.run(command, env={**os.environ, **RANK}, stdout=subprocess.PIPE, text=True, timeout=180)
    assert ended.stdout.split() == ["75"] * 8
