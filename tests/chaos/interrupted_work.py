"""Interrupted work: runs, merges and snapshots, and the files that must exist afterwards."""

import json
import shutil
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from tests.chaos.task import WIDE
from tests.commands.small_runs import load, run_here, settings, state_of
from tests.commands.test_resume import lines
from tests.limits import files_up_to
from twa_scale import Snapshots
from twa_scale.average.state import PREVIOUS, STATE, load_state
from twa_scale.config import RunConfig, validated
from twa_scale.merge import average_fixed, export_run
from twa_scale.run import run

Tensors = dict[str, Tensor]
NOTE = "notes.txt"
"""A file of the user next to the outputs."""


class Work(ABC):
    """Work in a directory. An interruption loses nothing, and a restart completes the work."""

    whole: Path
    """What it gives when nothing disturbs it."""

    @property
    @abstractmethod
    def phases(self) -> tuple[str, ...]:
        """Names of `target_process.PHASES`."""

    @abstractmethod
    def prepare(self, directory: Path) -> None:
        """Create the directory in its initial state."""

    @abstractmethod
    def do(self, directory: Path) -> None:
        """Do the work on one rank, or on the ranks of a pool."""

    @abstractmethod
    def found(self, directory: Path) -> Any:
        """Return the content that a reader finds."""

    @abstractmethod
    def check_kept(self, before: Any, directory: Path) -> None:
        """Check that the previous content or its replacement exists, and no partial output."""

    @abstractmethod
    def check_done(self, directory: Path, *, is_full: bool = False) -> None:
        """Check that the result equals that of undisturbed work, except for records lost while the disk was full."""


@dataclass
class OnDisk:
    """The content that a reader finds in the output of a run."""

    step: int
    """That of the state; -1 without one."""
    average: Tensors | None
    records: list[str]


@dataclass
class Training(Work):
    """A run from candidates, or one that continues an earlier run with fewer steps and replaces its average."""

    candidates: str
    whole: Path
    """The output of such a run that nothing disturbed."""
    earlier: Path | None = None
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def phases(self) -> tuple[str, ...]:
        return ("attach", "step", "evaluation", "state", "export", "results")

    def prepare(self, directory: Path) -> None:
        if self.earlier is None:
            directory.mkdir(exist_ok=True)
        else:
            shutil.copytree(self.earlier, directory, dirs_exist_ok=True)
        (directory / NOTE).write_text("mine")

    def settings(self, directory: Path) -> dict[str, Any]:
        usual = {"steps": 6, "evaluate_every": 2, "checkpoint_every": 1}
        return settings(self.candidates, WIDE, directory, **usual | self.changes)

    def do(self, directory: Path) -> None:
        run_here(self.settings(directory), pictures=True)

    def found(self, directory: Path) -> OnDisk:
        has_state = any((directory / name).exists() for name in (STATE, PREVIOUS))
        step = load_state(directory).step if has_state else -1
        records = lines(directory) if (directory / "metrics.jsonl").exists() else []
        # A run that continues from `step` evaluates at that step again.
        kept = [line for line in records if line["step"] < step or (line["step"] == step and "lr" in line)]
        return OnDisk(step, _average(directory / "average"), [json.dumps(line) for line in kept])

    def check_kept(self, before: OnDisk, directory: Path) -> None:
        current = self.found(directory)
        assert current.step >= before.step
        assert set(before.records) <= set(current.records)
        assert (directory / NOTE).read_text() == "mine"
        assert _same(current.average, before.average) or _same(current.average, _average(self.whole / "average"))

    def check_done(self, directory: Path, *, is_full: bool = False) -> None:
        assert torch.equal(state_of(directory)["twa"]["x"], state_of(self.whole)["twa"]["x"])
        assert _same(_average(directory / "average"), _average(self.whole / "average"))
        assert load_state(directory).finished and (directory / NOTE).read_text() == "mine"
        assert _names(directory) - {NOTE} == _names(self.whole) - {NOTE}
        messages, wanted = (
            [{key: value for key, value in line.items() if key != "seconds"} for line in lines(output)]
            for output in (directory, self.whole)
        )
        if is_full:  # records that could not be written are lost; those that were written are correct
            assert [line for line in wanted if line in messages] == messages
        else:
            assert messages == wanted
            points: list[object] = [(line["step"], pytest.approx(line["loss"])) for line in messages if "loss" in line]
            assert _board(directory) == points


@dataclass
class TrainingOnRanks(Training):
    """The same on ranks that use the variables of a launcher."""

    def do(self, directory: Path) -> None:
        run(validated(RunConfig, self.settings(directory)))


@dataclass
class Merge(Work):
    """`average`, or `export` if there is a run, which replaces an earlier output."""

    candidates: str
    whole: Path
    run: Path | None = None
    earlier: Path | None = None

    @property
    def phases(self) -> tuple[str, ...]:
        return ("average" if self.run is None else "export of a run",)

    def prepare(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        assert self.earlier is not None
        shutil.copytree(self.earlier, directory / "out")

    def do(self, directory: Path) -> None:
        if self.run is None:
            average_fixed([self.candidates], directory / "out", "ema:0.5", overwrite=True)
        else:
            export_run(self.run, directory / "out", overwrite=True)

    def found(self, directory: Path) -> Tensors | None:
        return _average(directory / "out")

    def check_kept(self, before: Tensors | None, directory: Path) -> None:
        current = self.found(directory)
        assert current is not None and (_same(current, before) or _same(current, _average(self.whole / "out")))

    def check_done(self, directory: Path, *, is_full: bool = False) -> None:
        assert _same(_average(directory / "out"), _average(self.whole / "out"))
        assert _names(directory) == {"out"} and _names(directory / "out") == _names(self.whole / "out")


@dataclass
class Snapshotting(Work):
    """A training loop with snapshots that continues from the last snapshot."""

    whole: Path
    """Of which all snapshots are kept."""
    asynchronous: bool = False
    keep_last: int | None = 3

    @property
    def phases(self) -> tuple[str, ...]:
        return ("asynchronous snapshot" if self.asynchronous else "snapshot",)

    def prepare(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)

    def do(self, directory: Path) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 300))
        done = max(self.found(directory), default=0)
        if done:
            model.load_state_dict(load(directory / f"step-{done:08d}"))
        options: dict[str, Any] = {"keep_last": self.keep_last, "asynchronous": self.asynchronous}
        with Snapshots(directory, every_n_steps=1, **options) as snapshots:
            for step in range(done + 1, 9):
                batch = torch.randn(4, 300, generator=torch.Generator().manual_seed(step))
                model(batch).square().mean().backward()
                with torch.no_grad():
                    for parameter in model.parameters():
                        assert parameter.grad is not None
                        parameter.sub_(0.1 * parameter.grad)
                model.zero_grad()
                snapshots.step(model, step)

    def found(self, directory: Path) -> set[int]:
        return {int(path.name.removeprefix("step-")) for path in directory.glob("step-*")}

    def check_kept(self, before: set[int], directory: Path) -> None:
        current = self.found(directory)
        assert self.keep_last is not None and set(sorted(before | current)[-self.keep_last :]) <= current
        for step in current:
            name = f"step-{step:08d}"
            assert _same(load(directory / name), load(self.whole / name)), name

    def check_done(self, directory: Path, *, is_full: bool = False) -> None:
        self.check_kept({6, 7, 8}, directory)
        assert _names(directory) == {f"step-{step:08d}" for step in (6, 7, 8)}


def _average(directory: Path) -> Tensors | None:
    """Return copies of the tensors, because those of `load` are views of the mapped file."""
    return {name: value.clone() for name, value in load(directory).items()} if directory.exists() else None


def _same(one: Tensors | None, other: Tensors | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def _board(directory: Path) -> list[tuple[int, float]]:
    """Return the losses in the TensorBoard file."""
    board = EventAccumulator(str(directory / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars("loss")]


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def attempt(work: Work, directory: Path, limit: int | None = None) -> None:
    """Do the work in a worker of the pool whose files are limited to `limit` bytes."""
    with nullcontext() if limit is None else files_up_to(limit):
        work.do(directory)
