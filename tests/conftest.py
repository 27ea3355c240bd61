"""Fixtures of all tests."""

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.old_torch import why_not
from tests.pool import Pool

pytest.register_assert_rewrite("tests.chaos.interrupted_work")  # assertions of these modules show values
torch.set_num_threads(1)  # for tensors of this size more threads only take time
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also in processes that tests start, because idle threads spin
settings.register_profile("no-deadline", deadline=None)  # the time of one example says little on a shared machine
settings.load_profile("no-deadline")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Run all tests of a file, which share fixtures, in one process, unless they name another group.

    Later hooks are too late: pytest-xdist reads the groups in the first of its own.
    """
    if item.get_closest_marker("xdist_group") is None:
        item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))


def pytest_collection_finish() -> None:
    """Keep the garbage collector from visiting modules and tests, which remain; that takes half a second each time.

    numba is imported here, because the process that distributes the tests does not need it.
    """
    from tests.compile_once import compile_once

    compile_once()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Skip a test that needs what the oldest supported torch lacks."""
    report = yield
    if report.failed and (reason := why_not(f"{report.longreprtext}\n{report.capstdout}\n{report.capstderr}")):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, f"Skipped: {reason}")
    return report


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Run a module-level function on real ranks: `ranks(function, world_size, **kwargs)`."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def nobody() -> Iterator[None]:
    """Change to a user whose permissions are checked, unlike those of root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
