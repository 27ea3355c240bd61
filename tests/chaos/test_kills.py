"""Processes that are killed at random moments lose no files, and a restarted process ends with the same bits."""

import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.chaos.interrupted_work import Work
from tests.chaos.target_process import ELSEWHERE, Moment, PhaseTiming, TargetProcess

KILLS = {"run": 36, "continued": 30, "average": 10, "export": 10, "snapshots": 12, "asynchronous": 12}
LEAST = 3  # in each phase


@pytest.mark.chaos
@pytest.mark.parametrize("name", KILLS)
def test_killed_at_random_moments(works: dict[str, Work], tmp_path: Path, name: str, chaos_seed: int) -> None:
    """Each process is killed in the phase with the fewest kills. Half of the restarted processes are killed, too."""
    work, kills = works[name], KILLS[name]
    started = time.monotonic()
    chance = random.Random(chaos_seed)
    usual = undisturbed(work, tmp_path / "undisturbed")
    hit: Counter[str] = Counter()
    lives = outputs = 0
    while hit.total() < kills or any(hit[phase] < LEAST for phase in work.phases):
        directory = tmp_path / str(outputs)
        work.prepare(directory)
        outputs += 1
        while True:
            lives += 1
            aim = min(work.phases, key=lambda phase: (hit[phase], chance.random()))
            moment = Moment.of(aim, usual[aim], chance)
            phase = life(work, directory, moment)
            if phase is None:
                break
            hit[phase] += 1
            if chance.random() < 0.5:
                work.do(directory)
                break
        work.check_done(directory)
        shutil.rmtree(directory)
        assert lives < 4 * kills, f"most kills come too late: {hit}"
    table = ", ".join(f"{phase} {hit[phase]}" for phase in (*work.phases, ELSEWHERE) if hit[phase])
    print(f"\nseed {chaos_seed}: {hit.total()} kills of {lives} lives, {outputs} outputs: {table}; ", end="")
    print(f"{time.monotonic() - started:.0f} s")


def undisturbed(work: Work, directory: Path) -> dict[str, PhaseTiming]:
    work.prepare(directory)
    victim = TargetProcess(work.do, directory, phases=work.phases)
    assert victim.ended() == 0, victim.output
    work.check_done(directory)
    return victim.usual()


def life(work: Work, directory: Path, moment: Moment) -> str | None:
    """Return the phase in which a process was killed, or None if it completed before."""
    before = work.found(directory)
    victim = TargetProcess(work.do, directory, phases=work.phases)
    if not victim.reach(moment):
        assert victim.ended() == 0, victim.output
        return None
    phase = victim.stop(signal.SIGKILL)
    if victim.ended() == 0:
        return None
    assert victim.ended() == -signal.SIGKILL, victim.output
    work.check_kept(before, directory)
    return phase
