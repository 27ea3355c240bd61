"""Fixtures of the chaos tests."""

import os
from collections.abc import Iterator
from hashlib import sha256

import pytest

from tests.chaos.interrupted_work import Merge, Snapshotting, Training, TrainingOnRanks, Work, attempt
from tests.chaos.task import WIDE
from tests.commands.small_runs import train_candidates
from tests.pool import Pool
from twa_scale.merge import average_fixed


@pytest.fixture
def chaos_seed() -> int:
    """Return the first seed. It is the same in each run unless CHAOS_SEED is set."""
    return int(os.environ.get("CHAOS_SEED", "1000"))


@pytest.fixture(scope="session")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("wide")
    pattern = train_candidates(WIDE, directory)
    before = {path: sha256(path.read_bytes()).digest() for path in directory.rglob("*.*")}
    yield pattern
    assert before == {path: sha256(path.read_bytes()).digest() for path in directory.rglob("*.*")}


@pytest.fixture(scope="session")
def works(candidates: str, ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Work]:
    """Return all works by name, with their results without disturbance."""
    root = tmp_path_factory.mktemp("undisturbed")
    earlier, first = root / "earlier", root / "first"
    made: dict[str, Work] = {
        "run": Training(candidates, root / "run"),
        "continued": Training(candidates, root / "continued", earlier),
        "average": Merge(candidates, root / "average", earlier=first),
        "export": Merge(candidates, root / "export", earlier, earlier=first),
        "snapshots": Snapshotting(root / "snapshots"),
        "asynchronous": Snapshotting(root / "snapshots", asynchronous=True),
    }
    Training(candidates, earlier, changes={"steps": 3}).do(earlier)
    average_fixed([candidates], first, "first")
    for name in ("run", "continued", "average", "export"):
        made[name].prepare(root / name)
        made[name].do(root / name)
    Snapshotting(root / "snapshots", keep_last=None).do(root / "snapshots")
    made["two ranks"] = Training(candidates, root / "two-ranks", changes={"engine": "fsdp2"})
    made["two ranks"].prepare(root / "two-ranks")
    ranks(attempt, 2, work=made["two ranks"], directory=root / "two-ranks")
    return made


@pytest.fixture(scope="session")
def two_ranks(works: dict[str, Work]) -> TrainingOnRanks:
    whole = works["two ranks"]
    assert isinstance(whole, Training)
    return TrainingOnRanks(whole.candidates, whole.whole, changes=whole.changes)
