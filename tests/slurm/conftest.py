"""A SLURM of two nodes for the whole session, and a job on it."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from tests.commands import small_runs
from tests.commands.conftest import TrainedCandidates
from tests.slurm.cluster import PACKAGES, Cluster, missing_programs

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "slurm.sbatch"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
T = TypeVar("T")


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    if missing := missing_programs():
        text = f"SLURM is not installed (no {', '.join(missing)}); these tests need the Debian packages {PACKAGES}."
        if os.geteuid() == 0 and shutil.which("apt-get"):
            pytest.fail(f"{text} `make setup` installs them.", pytrace=False)
        pytest.skip(text)
    if os.geteuid() != 0:
        pytest.skip("slurmctld and slurmd have to be started by root.")
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as directory:  # a socket's short path
        cluster = Cluster(Path(directory))
        try:
            yield cluster
        finally:
            cluster.close()


def with_python(slurm: Cluster, python: str = sys.executable) -> dict[str, str]:
    """Return the variables of a shell in which `python` is this one, as in an activated environment."""
    return {"PATH": f"{Path(python).parent}:{slurm.environment['PATH']}"}


@dataclass
class Job:
    """A submitted job and its output."""

    slurm: Cluster
    number: str
    output: Path

    @property
    def facts(self) -> Mapping[str, str]:
        """Return what SLURM reports about the job."""
        return self.slurm.job(self.number)

    def wait(self, *states: str, timeout: float = 180.0) -> Mapping[str, str]:
        """Return the facts as soon as the job is in one of `states`, or when it has ended."""
        wanted = states or ENDED
        return self.until(lambda: facts if (facts := self.facts)["JobState"] in wanted else None, timeout)

    def until(self, look: Callable[[], T | None], timeout: float = 180.0) -> T:
        """Return the first true answer of `look`."""
        return self.slurm.until(look, timeout, self.said)

    def said(self) -> str:
        """Return the output so far."""
        return self.output.read_text() if self.output.exists() else ""


@pytest.fixture
def submit(slurm: Cluster, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Run `sbatch OPTIONS launch/slurm.sbatch WORDS` in the root of the repository. Remaining jobs are cancelled."""
    jobs: list[Job] = []

    def type_(*words: object, options: tuple[object, ...] = (), python: str = sys.executable, **variables: str) -> Job:
        output = tmp_path / f"job-{len(jobs)}.out"
        command = ("sbatch", "--parsable", "--output", output, *options, SCRIPT, *words)
        jobs.append(
            Job(slurm, slurm.call(*command, cwd=ROOT, variables=variables | with_python(slurm, python)), output)
        )
        return jobs[-1]

    yield type_
    for job in jobs:
        if job.facts["JobState"] not in ENDED:
            slurm.call("scancel", "--full", job.number)
            job.wait()


@pytest.fixture(scope="session")
def scores(tmp_path_factory: pytest.TempPathFactory) -> TrainedCandidates:
    directory = tmp_path_factory.mktemp("scores")
    return TrainedCandidates(small_runs.SCORES, small_runs.train_candidates(small_runs.SCORES, directory))
