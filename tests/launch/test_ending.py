"""A rank exits with its own code although threads still run."""

import os
import subprocess
import sys
from pathlib import Path

RANK = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}


def test_threads_of_gloo_do_not_change_the_exit_code(tmp_path: Path) -> None:
    """With `sys.exit` instead of `exit_process` nine of ten such ranks abort, so the test starts six."""
    for life in range(3):
        command = [sys.executable, "-m", "tests.launch.leaving", str(tmp_path / str(life))]
        ranks = [
            subprocess.Popen(command, env={**os.environ, **RANK, "SLURM_PROCID": rank, "SLURM_LOCALID": rank})
            for rank in "01"
        ]
        assert [rank.wait(60) for rank in ranks] == [75, 75]
