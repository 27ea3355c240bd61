"""A rank that does not come ends the others within the time-out, with an error that names it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("how", "who", "words"),
    [
        ("frozen", 1, ["rank 1", "process", "frozen"]),
        pytest.param("frozen", 0, ["rank 0", "does not answer"], marks=pytest.mark.slow),  # it holds the store of all
        pytest.param("gone", 2, ["rank 2"], marks=pytest.mark.slow),
        pytest.param("busy", 1, ["rank 1 did not come"], marks=pytest.mark.slow),
        ("failed", 1, ["rank 1 failed", "the data is not mounted on this node"]),
    ],
)
def test_the_others_end_and_name_it(tmp_path: Path, how: str, who: int, words: list[str]) -> None:
    command = [sys.executable, "-m", "tests.launch.missing", how, str(who), str(tmp_path)]
    ranks = {
        rank: subprocess.Popen(
            command,
            env={**os.environ, **SLURM, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    }
    missing = ranks.pop(who)
    try:
        for rank, process in ranks.items():
            _, said = process.communicate(timeout=240)
            assert process.returncode == 2, said
            assert "Exception in thread" not in said
            last = next(line for line in said.splitlines() if line.startswith("RankError"))
            assert f"rank {rank} waited in vain" in last and all(word in last for word in words), said
    finally:
        missing.kill()
        missing.communicate()
