"""A full disk raises an error that names the file and keeps existing files. The work succeeds once there is space."""

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from tests.chaos.interrupted_work import Work, attempt
from tests.limits import resize, small_disk
from tests.pool import Outcome, Pool
from twa_scale.errors import OutputError

CASES = {"run": 4, "continued": 4, "two ranks": 3, "average": 6, "export": 6, "snapshots": 6, "asynchronous": 6}
"""By work, for each way in which a disk is full."""
RANKS = {"two ranks": 2, "average": 2, "export": 2}
ENOUGH = 1 << 28  # size in bytes of a disk that is not full


@dataclass
class Disk:
    """A directory on a disk that is full or becomes full."""

    directory: Path
    limit: int | None = None
    """Bytes of the largest file that can be written."""
    mount: Path | None = None
    filling: threading.Timer | None = None

    def free_space(self) -> None:
        """Free space."""
        self.limit = None
        if self.filling:
            self.filling.join()
            (self.directory.parent / "other").unlink()
        if self.mount:
            resize(self.mount, ENOUGH)


def limited(work: Work, root: Path, chance: random.Random, _: float) -> Iterator[Disk]:
    """Limit the size of files to a random value up to that of the largest file. Small limits are likely."""
    work.prepare(root)
    yield Disk(root, int(max(_sizes(work.whole)) ** chance.random()))


def small(work: Work, root: Path, chance: random.Random, _: float) -> Iterator[Disk]:
    """Provide space for a random part of the data."""
    with small_disk(root, ENOUGH):
        work.prepare(root / "work")
        resize(root, _used(root) + int(chance.random() * sum(_sizes(work.whole))))
        yield Disk(root / "work", mount=root)


def filled(work: Work, root: Path, chance: random.Random, seconds: float) -> Iterator[Disk]:
    """Let another process fill all but a random rest of the disk at a random moment."""

    def fill() -> None:
        free = os.statvfs(root).f_bavail * os.statvfs(root).f_frsize
        with suppress(OSError):  # the work has used some of the space meanwhile
            (root / "other").write_bytes(bytes(max(0, free - rest)))

    with small_disk(root, ENOUGH):
        work.prepare(root / "work")
        needed = sum(_sizes(work.whole))
        resize(root, _used(root) + 3 * needed)
        rest = int(0.2 * chance.random() * needed)
        timer = threading.Timer(chance.random() * seconds, fill)
        timer.start()
        yield Disk(root / "work", mount=root, filling=timer)


METHODS = {method.__name__: contextmanager(method) for method in (limited, small, filled)}


@pytest.mark.chaos
@pytest.mark.parametrize("name", CASES)
def test_full_disks(ranks: Pool, works: dict[str, Work], tmp_path: Path, name: str, chaos_seed: int) -> None:
    work, size = works[name], RANKS.get(name, 1)
    started = time.monotonic()
    work.prepare(tmp_path)
    ranks(attempt, size, work=work, directory=tmp_path)
    seconds = time.monotonic() - started
    refused = Counter(dict.fromkeys(METHODS, 0))
    for number, method in product(range(CASES[name]), METHODS):
        chance = random.Random(f"{chaos_seed} {name} {method} {number}")
        with METHODS[method](work, tmp_path / f"{method}-{number}", chance, seconds) as disk:
            before = work.found(disk.directory)
            outcomes = ranks.outcomes(attempt, size, work=work, directory=disk.directory, limit=disk.limit)
            disk.free_space()
            if all(outcome.error is None for outcome in outcomes):
                work.check_done(disk.directory, is_full=True)
            else:
                refused[method] += 1
                require_named(outcomes, disk.directory)
                work.check_kept(before, disk.directory)
                assert not [path.name for path in disk.directory.iterdir() if ".tmp-" in path.name]
            repeated = time.monotonic()
            ranks(attempt, size, work=work, directory=disk.directory)
            seconds = time.monotonic() - repeated
            work.check_done(disk.directory, is_full=True)
    table = ", ".join(f"{kind} {count} of {CASES[name]}" for kind, count in refused.items())
    print(f"\n{name}: seed {chaos_seed}: errors of disks: {table}; {time.monotonic() - started:.0f} s")
    assert refused.total() >= CASES[name] / 2


def require_named(outcomes: list[Outcome], directory: Path) -> None:
    """Check that every rank raises the same error, which names the file or its output."""
    for outcome in outcomes:
        assert outcome.same_error(outcomes[0]), outcomes
        assert isinstance(outcome.error, OutputError), outcome.trace
        assert str(directory) in str(outcome.error)


def _sizes(directory: Path) -> list[int]:
    return [path.stat().st_size for path in directory.rglob("*") if path.is_file()]


def _used(disk: Path) -> int:
    actual = os.statvfs(disk)
    return (actual.f_blocks - actual.f_bfree) * actual.f_frsize
