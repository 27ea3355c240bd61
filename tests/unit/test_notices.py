"""Notices have the line of the caller, and the command line prints each on one line."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import twa_scale
from twa_scale import TwaWarning
from twa_scale.base.notices import notice
from twa_scale.cli import program


def test_notice_is_attributed_to_the_caller() -> None:
    model, states = torch.nn.Linear(2, 2), [torch.nn.Linear(2, 2).state_dict()] * 2
    with pytest.warns(TwaWarning, match="same checksum") as caught:
        twa_scale.attach(model, states)
    assert [warning.filename for warning in caught] == [__file__]


def test_notice_is_attributed_to_the_caller_of_a_trainer() -> None:
    """Lines of the trainer are between them: a user calls `trainer.train()`, which calls callbacks."""
    trainer = {"__name__": "transformers.trainer_callback", "notice": notice}
    exec(compile("def train(): notice('a')", "trainer_callback.py", "exec"), trainer)
    with pytest.warns(TwaWarning) as caught:
        trainer["train"]()  # type: ignore[operator]
    assert [warning.filename for warning in caught] == [__file__]


def test_standard_output_on_a_full_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patches:
        patches.setattr(sys, "stdout", full)
        patches.setattr(program, "app", lambda **_: print("text", flush=True))
        with pytest.raises(SystemExit) as left:
            program.main()
    assert left.value.code == 2 and "standard output cannot be written: No space left" in capsys.readouterr().err


def test_current_directory_that_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit):
        program.main()
    assert "current directory cannot be read" in capsys.readouterr().err


def test_command_line_prints_one_line() -> None:
    program = """
import twa_scale.cli.program as cli
from twa_scale.base.notices import notice
cli.app = lambda **_: [notice(text) for text in ("a [b] 'c'", "a [b] 'c'", "x:a:0.5")]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr.splitlines() == ["note: a [b] 'c'", "note: x:a:0.5"]
