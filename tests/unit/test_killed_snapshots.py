"""If a process that writes snapshots is killed before any change to files, the next start completes its work."""

import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from twa_scale import Snapshots
from twa_scale.output.temporary import TemporaryName

FORK = multiprocessing.get_context("fork")
CHANGES = {"fcntl.flock", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
Life = Callable[[Path], None]


def save(directory: Path, *steps: int, asynchronous: bool = False) -> None:
    with Snapshots(directory, every_n_steps=1, keep_last=3, asynchronous=asynchronous) as snapshots:
        for step in steps:
            model = nn.ParameterDict({"a": nn.Parameter(torch.full((4,), float(step)))})
            snapshots.step(model, step)


def save_fourth(directory: Path) -> None:
    save(directory, 4)


def save_fourth_asynchronously(directory: Path) -> None:
    save(directory, 4, asynchronous=True)


def visible(directory: Path) -> set[int]:
    """Return the steps of the candidates, all of which are complete."""
    steps = {int(path.name.removeprefix("step-")) for path in directory.glob("step-*")}
    for step in steps:
        assert load_file(directory / f"step-{step:08d}/model.safetensors")["a"].tolist() == [step] * 4
    return steps


def die_before(change: int, number: signal.Signals) -> None:
    """Send a signal to this process before its `change`-th change to files from now on."""
    left = count(change - 1, -1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if (event in CHANGES or (event == "open" and arguments[2] & WRITES)) and next(left) == 0:
            os.kill(os.getpid(), number)
            time.sleep(60)  # the handler, if any, runs here

    sys.addaudithook(hook)


def killed_life(life: Life, directory: Path, change: int, number: signal.Signals) -> None:
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)  # The process that runs the tests may ignore it.
    die_before(change, number)
    life(directory)


def after_kills(life: Life, start: Path, number: signal.Signals) -> Iterator[Path]:
    """Yield the results of `start` in processes that were killed before their first change of files, the second, ..."""
    for change in count(1):
        directory = start.with_name(f"{life.__name__}-{change}")
        shutil.copytree(start, directory)
        process = FORK.Process(target=killed_life, args=(life, directory, change, number))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            return
        assert process.exitcode == -number
        yield directory


@pytest.fixture
def three(tmp_path: Path) -> Path:
    save(tmp_path / "start", 1, 2, 3)
    return tmp_path / "start"


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
@pytest.mark.parametrize("life", [save_fourth, save_fourth_asynchronously])
def test_a_step_is_written_and_the_oldest_deleted_or_neither(three: Path, life: Life, number: signal.Signals) -> None:
    actual = []
    for directory in after_kills(life, three, number):
        actual.append(visible(directory))
        save(directory)
        wanted = {2, 3, 4} if 4 in actual[-1] else {1, 2, 3}
        assert {path.name for path in directory.iterdir()} == {f"step-{step:08d}" for step in wanted}
        assert visible(directory) == wanted
    assert [steps for i, steps in enumerate(actual) if steps not in actual[:i]] == [{1, 2, 3}, {1, 2, 3, 4}, {2, 3, 4}]


def test_kills_of_the_restarted_process(three: Path) -> None:
    after_publication = next(path for path in after_kills(save_fourth, three, signal.SIGKILL) if 4 in visible(path))
    starts = 0
    for directory in after_kills(save, after_publication, signal.SIGKILL):
        starts += 1
        save(directory)
        assert {path.name for path in directory.iterdir()} == {f"step-{step:08d}" for step in (2, 3, 4)}
    assert starts > 3


def test_signals_do_not_remove_names_of_other_threads(tmp_path: Path) -> None:
    """Only names of the main thread are removed, because another thread may be publishing."""

    def hold(directory: Path) -> None:
        TemporaryName(directory / "of a thread").leave_to_next_start()
        with TemporaryName(directory / "of the main thread"):
            signal.raise_signal(signal.SIGTERM)

    process = FORK.Process(target=killed_life, args=(hold, tmp_path, 1000, signal.SIGTERM))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGTERM
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".of a thread.tmp-")
