"""A run that is killed at any change to the disk continues with the result of an undisturbed run."""

import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands.conftest import TrainedCandidates
from tests.commands.small_runs import load, run_here, settings
from tests.commands.test_stopping import same_end
from tests.pool import PRELOAD
from twa_scale.average.state import load_state

CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
"""Events of Python's own audit by which files are opened, renamed and removed."""


def run_until(data: dict[str, Any], number: int, counted: str) -> None:
    """Run, kill the process before the `number`-th change of the output, and write the number of changes."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in CHANGES or data["output"] not in str(arguments[0]):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    torch.set_num_threads(1)
    run_here(data, pictures=True)
    Path(counted).write_text(str(seen))


def life(data: dict[str, Any], number: int, counted: Path) -> int | None:
    """Return the exit status of a process that is killed at a given change."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=run_until, args=(data, number, str(counted)))
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize(("lives", "seed"), [(4, 0), pytest.param(30, 1, marks=pytest.mark.slow)])
def test_killed_at_any_change_of_the_disk(scores: TrainedCandidates, tmp_path: Path, lives: int, seed: int) -> None:
    """The changes include saves, records, exports and the end. Every output has the bits of an undisturbed run."""
    data = settings(scores.candidates, scores.task, tmp_path / "whole", checkpoint_every=1, evaluate_every=2)
    assert life(data, 0, tmp_path / "count") == 0
    changes = int((tmp_path / "count").read_text())
    assert changes > 40
    # The first changes, those at the end, where results are written, and some between.
    numbers = [1, changes, changes - 1, *random.Random(seed).sample(range(2, changes - 1), lives - 3)]
    for number in numbers:
        output = tmp_path / f"killed-{number}"
        data["output"] = str(output)
        assert life(data, number, tmp_path / "count") == -signal.SIGKILL, number
        run_here(data)
        same_end(tmp_path / "whole", output)
        assert load_state(output).finished, number
        left = {path.name for path in output.iterdir()} - {path.name for path in (tmp_path / "whole").iterdir()}
        assert all(".tmp-" in name or name == ".lock" for name in left), (
            number,
            left,
        )  # temporary files are not results


def test_killed_repeatedly(scores: TrainedCandidates, tmp_path: Path) -> None:
    """Each process is killed a little later than the previous one. Each continues from the state."""
    data = settings(scores.candidates, scores.task, tmp_path / "out", checkpoint_every=1, evaluate_every=2)
    number, lives = 15, 0
    while life(data, number, tmp_path / "count") == -signal.SIGKILL:
        number, lives = number + 12, lives + 1
        assert lives < 30
    assert lives >= 3
    data["output"] = str(tmp_path / "whole")
    run_here(data)
    same_end(tmp_path / "whole", tmp_path / "out")
    assert load(tmp_path / "out/average").keys() == load(tmp_path / "whole/average").keys()
