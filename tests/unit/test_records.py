"""The records of a run consist of complete lines, also if the disk is full."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.limits import files_up_to
from twa_scale.errors import OutputError
from twa_scale.run.records import METRICS, Records, read_records


def scalars(directory: Path, name: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(directory / "tensorboard"))
    board.Reload()
    return [(event.step, round(event.value, 6)) for event in board.Scalars(name)]


def test_temporarily_full_disk_loses_nothing(tmp_path: Path) -> None:
    messages: list[str] = []
    records = Records(tmp_path, active=True, step=0, log=messages.append)
    for step in range(1, 30):
        if step < 10 or step > 20:
            records.write(step, {"loss": step / 8, "lr": 0.5})
        else:
            with files_up_to(400):
                records.write(step, {"loss": step / 8, "lr": 0.5})
                assert (tmp_path / METRICS).read_bytes().endswith(b"\n")
    records.close()
    expected = [(step, step / 8) for step in range(1, 30)]
    assert [(line["step"], line["loss"]) for line in read_records(tmp_path)] == expected
    assert scalars(tmp_path, "loss") == expected
    assert len(messages) == 2 and all(
        "could not be written" in text and "The run continues" in text for text in messages
    )
    assert sorted(METRICS in text for text in messages) == [False, True]


def test_lost_bytes_are_reported(tmp_path: Path) -> None:
    messages: list[str] = []
    records = Records(tmp_path, active=True, step=0, log=messages.append)
    with files_up_to(10):
        records.write(1, {"loss": 0.5})
        records.close()
    assert read_records(tmp_path) == [] and any("are lost" in text for text in messages)


def test_records_that_cannot_be_created(tmp_path: Path) -> None:
    Records(tmp_path, active=True, step=0, log=print).write(1, {"loss": 0.5, "lr": 0.1})
    with files_up_to(10), pytest.raises(OutputError, match=METRICS):
        Records(tmp_path, active=True, step=1, log=print)
    assert len(read_records(tmp_path)) == 1


def test_damaged_lines_are_removed_and_counted(tmp_path: Path) -> None:
    first, last = b'{"step": 1, "loss": 0.5, "lr": 0.1}', b'{"step": 2, "loss": 0.25, "lr": 0.1}'
    damaged = [b"\xff\xfe", b"[" * 100_000, b"3", b'{"loss": 2}', b'{"step": "2"}', b'{"step": 2, "loss": "high"}']
    lines = [first, *damaged, last, b'{"step": 3, "lo']
    (tmp_path / METRICS).write_bytes(b"\n".join(lines))
    messages: list[str] = []
    Records(tmp_path, active=True, step=2, log=messages.append).close()
    assert [json.loads(line)["loss"] for line in (tmp_path / METRICS).read_text().splitlines()] == [0.5, 0.25]
    assert len(messages) == 1 and "7 damaged lines" in messages[0]


def test_resumed_run_replaces_records_of_repeated_steps(tmp_path: Path) -> None:
    first = Records(tmp_path, active=True, step=0, log=print)
    first.write(0, {"validation/loss": 1.0})
    for step in (1, 2, 3):
        first.write(step, {"loss": step / 8, "lr": 0.5})
    first.write(2, {"validation/loss": 0.5})
    second = Records(tmp_path, active=True, step=2, log=print)
    second.write(2, {"validation/loss": 0.25})
    second.write(3, {"loss": 9.0, "lr": 0.5})
    assert scalars(tmp_path, "loss") == [(1, 0.125), (2, 0.25), (3, 9.0)]
    assert scalars(tmp_path, "validation/loss") == [(0, 1.0), (2, 0.25)]
    assert [line.get("loss") for line in read_records(tmp_path)] == [None, 0.125, 0.25, None, 9.0]
