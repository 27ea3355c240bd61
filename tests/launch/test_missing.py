"""When a rank is missing, the other ranks end within the time limit, with an error that names it."""

from pathlib import Path

import pytest

from tests.chaos.target_process import TargetProcess
from tests.launch.missing_rank import run

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("mode", "failed_rank", "words"),
    [
        pytest.param("frozen", 1, ["rank 1", "process", "frozen"], marks=pytest.mark.slow),
        pytest.param("frozen", 0, ["rank 0", "does not answer"], marks=pytest.mark.slow),  # rank 0 holds the store
        pytest.param("gone", 2, ["rank 2"], marks=pytest.mark.slow),
        pytest.param("busy", 1, ["rank 1 did not join"], marks=pytest.mark.slow),
        ("failed", 1, ["rank 1 failed", "the data is not mounted on this node"]),
    ],
)
def test_other_ranks_name_the_missing_rank(tmp_path: Path, mode: str, failed_rank: int, words: list[str]) -> None:
    ranks = {
        rank: TargetProcess(
            run,
            mode,
            failed_rank,
            tmp_path,
            phases=(),
            environment={**SLURM, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(3)
    }
    missing = ranks.pop(failed_rank)
    try:
        for rank, process in ranks.items():
            assert process.ended() == 2, process.output
            assert "Exception in thread" not in (tmp_path / f"stderr-{rank}").read_text()
            assert process.output.startswith(f"RankError: rank {rank} could not complete a collective"), process.output
            assert all(word in process.output for word in words), process.output
    finally:
        for process in (missing, *ranks.values()):
            process.kill()
