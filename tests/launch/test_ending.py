"""A rank leaves with its own exit code, whatever threads it leaves behind."""

import os
import subprocess
import sys
from pathlib import Path

RANK = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}


def test_threads_of_gloo_do_not_change_the_exit_code(tmp_path: Path) -> None:
    """With `sys.exit` in place of `end` nine of ten such ranks abort; so one that does not is no proof, but six are."""
    for life in range(3):
        command = [sys.executable, "-m", "tests.launch.leaving", str(tmp_path / str(life))]
        ranks = [
            subprocess.Popen(command, env={**os.environ, **RANK, "SLURM_PROCID": rank, "SLURM_LOCALID": rank})
            for rank in "01"
        ]
        assert [rank.wait(60) for rank in ranks] == [75, 75]
