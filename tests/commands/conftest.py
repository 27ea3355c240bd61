"""Candidates that are trained once per session, and a function that runs commands."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.commands import small_runs


@dataclass
class TrainedCandidates:
    """A task section, and the pattern of candidates that were trained on it."""

    task: dict[str, Any]
    candidates: str


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> TrainedCandidates:
    directory = tmp_path_factory.mktemp("text")
    files = {"config.json": b'{"model_type": "byte_gpt"}', "tokenizer.json": b"{}"}
    return TrainedCandidates(small_runs.TEXT, small_runs.train_candidates(small_runs.TEXT, directory, files=files))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> TrainedCandidates:
    directory = tmp_path_factory.mktemp("digits")
    task = small_runs.digits(directory / "digits.npz")
    return TrainedCandidates(task, small_runs.train_candidates(task, directory))


@pytest.fixture(scope="session")
def scores(tmp_path_factory: pytest.TempPathFactory) -> TrainedCandidates:
    directory = tmp_path_factory.mktemp("scores")
    return TrainedCandidates(small_runs.SCORES, small_runs.train_candidates(small_runs.SCORES, directory))


@dataclass
class CommandResult:
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., CommandResult]]:
    """Run a command in this process, as the console script does: `shell("inspect", path, "--json")`."""
    from twa_scale.cli import main

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("RANK", raising=False)

    def type_(*words: object) -> CommandResult:
        monkeypatch.setattr(sys, "argv", ["twa-scale", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        result = capsys.readouterr()
        return CommandResult(int(ended.value.code or 0), result.out, result.err)

    yield type_


@pytest.fixture
def copied(text: TrainedCandidates, tmp_path: Path) -> TrainedCandidates:
    """Return a copy of the text candidates that a test may damage."""
    for path in Path(text.candidates).parent.glob("step-*"):
        (tmp_path / "mine" / path.name).mkdir(parents=True)
        for file in path.iterdir():
            (tmp_path / "mine" / path.name / file.name).write_bytes(file.read_bytes())
    return TrainedCandidates(text.task, str(tmp_path / "mine" / "step-*"))
