"""The batch script handles all ways in which a run can end, with the real SLURM and a simulated run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Job

pytestmark = pytest.mark.xdist_group("slurm")

# Ends as a run that is asked to stop. A DEAF rank dies of SIGUSR1, as one that still imports torch.
PROGRAM = """#!/bin/bash
echo "life ${SLURM_RESTART_COUNT:-0} rank $SLURM_PROCID: $*"
[ "$FAIL" ] && exit $FAIL
[ "$SLURM_RESTART_COUNT" ] && exit 0
[ "$DEAF" ] || trap 'sleep 0.$((1 + SLURM_PROCID * 6)); exit 75' USR1 TERM
while :; do sleep 0.1; done
"""


@pytest.fixture
def start(submit: Callable[..., Job], tmp_path: Path) -> Callable[..., Job]:
    """Submit a job whose ranks run the replacement, and return when it has started."""
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    program.write_text(PROGRAM)
    program.chmod(0o755)

    def start(*words: str, options: tuple[object, ...] = (), **variables: str) -> Job:
        job = submit("config.yaml", *words, options=options, python=str(program), **variables)
        job.until(lambda: job.said().count("life 0") == 2, timeout=60)
        return job

    return start


@pytest.mark.parametrize("deaf", ["", pytest.param("1", marks=pytest.mark.slow)])
def test_stopped_runs_continue(slurm: Cluster, start: Callable[..., Job], deaf: str) -> None:
    job = start("groups=block", "center=[0.5, 0.5]", DEAF=deaf)
    slurm.call("scancel", "--signal=USR1", "--batch", job.number)
    assert job.wait("COMPLETED")["Restarts"] == "1"
    words = "-m twa_scale run config.yaml groups=block center=[0.5, 0.5]"
    messages = {f"life {life} rank {rank}: {words}{' resume=true' * life}" for life in (0, 1) for rank in (0, 1)}
    assert messages <= set(job.said().splitlines()), job.said()


def test_cancelled_jobs_are_not_requeued(slurm: Cluster, start: Callable[..., Job]) -> None:
    job = start()
    slurm.call("scancel", job.number)
    job.until(lambda: job.said().count("exit code 75") == 2)  # although the ranks have saved
    facts = job.wait()
    assert facts["JobState"] == "CANCELLED" and facts["Restarts"] == "0" and "life 1" not in job.said()


@pytest.mark.parametrize("code", [1, 2])
def test_failed_call_is_not_repeated(start: Callable[..., Job], code: int) -> None:
    facts = start(FAIL=str(code)).wait()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", f"{code}:0", "0")


def test_job_that_may_not_be_requeued_is_reported(slurm: Cluster, start: Callable[..., Job]) -> None:
    job = start(options=("--no-requeue",))
    slurm.call("scancel", "--signal=USR1", "--batch", job.number)
    assert job.wait()["ExitCode"] == "75:0" and "submit it again to continue" in job.said()
