"""If a rank is frozen or killed at a random moment, the others end in time, name it, and lose no files."""

import random
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.interrupted_work import TrainingOnRanks
from tests.chaos.target_process import Moment, PhaseTiming, TargetProcess

TRIALS = {signal.SIGSTOP: 10, signal.SIGKILL: 4}
AT_ONCE = 3
TIMEOUT = 6.0  # time in seconds that ranks wait for each other
SOON, LATE = (
    10.0,
    30.0,
)  # further seconds until the other ranks have checked the missing rank; it takes longer if that rank has the store
NAMED, NONE_WAITED, TOO_SLOW = "named", "nobody waited for it any more", "ended before, on a slow machine"


@pytest.mark.chaos
def test_ranks_missing_at_random_moments(two_ranks: TrainingOnRanks, tmp_path: Path, chaos_seed: int) -> None:
    started = time.monotonic()
    two_ranks.prepare(tmp_path / "usual")
    processes = to_the_end(two_ranks, tmp_path / "usual", 0)
    usual = [process.usual() for process in processes]
    numbers = [number for number, count in TRIALS.items() for _ in range(count)]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        trials = [
            threads.submit(trial, two_ranks, tmp_path / str(job), job, number, usual, chaos_seed)
            for job, number in enumerate(numbers, 1)
        ]
    ended = Counter(result.result()[0] for result in trials)
    longest = max(result.result()[1] for result in trials)
    print(
        f"\nseed {chaos_seed}: {len(numbers)} ranks missing: {dict(ended)}. With a time-out of {TIMEOUT:.0f} s the ",
        end="",
    )
    print(f"others had ended after {longest:.0f} s; {time.monotonic() - started:.0f} s")
    assert ended[NAMED] >= 0.7 * len(numbers)


def trial(
    work: TrainingOnRanks,
    directory: Path,
    job: int,
    signal_number: signal.Signals,
    usual: list[dict[str, PhaseTiming]],
    seed: int,
) -> tuple[str, float]:
    """Return the outcome, and the seconds from the signal to the end of the other rank."""
    chance = random.Random(f"{seed} {job}")
    failed_rank = job % 2
    aim = chance.choice(sorted(usual[failed_rank]))
    moment = Moment.of(aim, usual[failed_rank][aim], chance)
    hasty = replace(work, changes={**work.changes, "timeout": TIMEOUT})
    work.prepare(directory)
    processes = start(hasty, directory, job)
    missing, other = processes[failed_rank], processes[1 - failed_rank]
    try:
        reached = missing.reach(moment)
        phase = missing.stop(signal_number) if reached else ""
        start_time = time.monotonic()
        code = other.ended(TIMEOUT + (LATE if failed_rank == 0 else SOON))
        took = time.monotonic() - start_time
    finally:
        missing.kill()
        other.kill()
    outcome = NAMED
    if not reached:
        outcome = TOO_SLOW
    elif code == 0:
        outcome = NONE_WAITED
    else:
        description = (
            f"rank {failed_rank} of job {job}, {signal_number.name} in {phase}: "
            f"the other ended with {code}: {other.output}"
        )
        assert code == 2 and other.output.startswith(
            f"RankError: rank {1 - failed_rank} could not complete a collective"
        ), description
        assert f"rank {failed_rank}" in other.output, description
    before = work.found(directory)
    to_the_end(work, directory, job)
    work.check_kept(before, directory)
    work.check_done(directory)
    return outcome, took


def to_the_end(work: TrainingOnRanks, directory: Path, job: int) -> list[TargetProcess]:
    processes = start(work, directory, job)
    assert [process.ended() for process in processes] == [0, 0], [process.output for process in processes]
    return processes


def start(work: TrainingOnRanks, directory: Path, job: int) -> list[TargetProcess]:
    shared = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    own = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    return [TargetProcess(work.do, directory, phases=work.phases, environment=shared | local) for local in own]
