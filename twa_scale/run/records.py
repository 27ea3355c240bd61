"""The metrics of a run, as JSON lines and as TensorBoard events. Rank 0 only."""

import json
import os
import socket
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from twa_scale.output import AppendedFile
from twa_scale.output.publish import output_errors

METRICS = "metrics.jsonl"


class Records:
    """A writer of metrics.jsonl and a TensorBoard event file; on other ranks it does nothing.

    A full disk does not stop a run: see `AppendedFile`. The writer of TensorBoard would raise in a thread.
    """

    def __init__(self, directory: Path, *, active: bool, step: int, say: Callable[[str], object]) -> None:
        """Open the records of a run that continues at `step`. Lines that the run will write again are removed.

        Args:
            directory: the output directory of the run.
            active: whether this rank writes.
            step: the number of steps that are done.
            say: called with one line of text.

        Raises:
            OutputError: the files cannot be created; an older metrics.jsonl is unchanged.
        """
        self._files: tuple[AppendedFile, AppendedFile] | None = None
        if not active:
            return
        known, damaged = _read(directory) if step else ([], 0)
        if damaged:
            say(f"{directory / METRICS}: {damaged} damaged lines were removed.")
        kept = [line for line in known if line["step"] < step or (line["step"] == step and "lr" in line)]
        lines = "".join(json.dumps(line) + "\n" for line in kept)
        self._files = (
            AppendedFile(directory / METRICS, lines.encode(), say),
            AppendedFile(directory / "tensorboard" / _event_file(), _opening(step), say),
        )
        for line in kept:
            if line["step"] == step:  # the session log hides earlier events of this step
                self._files[1].write(_scalars(line))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write one line."""
        if self._files is None:
            return
        metrics, board = self._files
        metrics.write((json.dumps({"step": step, **values}) + "\n").encode())
        board.write(_scalars({"step": step, **values}))

    def close(self) -> None:
        """Close the files, after a last attempt to write lines that a full disk has delayed."""
        for file in self._files or ():
            file.close()


def read_records(directory: Path) -> list[dict[str, Any]]:
    """Return the records that a run has written so far, without damaged lines."""
    return _read(directory)[0]


def _read(directory: Path) -> tuple[list[dict[str, Any]], int]:
    path = directory / METRICS
    if not path.is_file():
        return [], 0
    with output_errors(path):
        *whole, rest = path.read_bytes().split(b"\n")
    lines = [line for line in map(_record, whole) if line is not None]
    return lines, len(whole) - len(lines) + bool(rest)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    return record if all(isinstance(value, int | float) for value in record.values()) else None


def _event_file() -> str:
    return f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"


def _opening(step: int) -> bytes:
    """Return the first events of a file, which replaces the events of earlier files from `step` on."""
    start = SessionLog(status=SessionLog.START)
    return _framed(Event(wall_time=time.time(), file_version="brain.Event:2")) + _framed(
        Event(wall_time=time.time(), step=step, session_log=start)
    )


def _scalars(line: dict[str, Any]) -> bytes:
    values = [Summary.Value(tag=name, simple_value=value) for name, value in line.items() if name != "step"]
    return _framed(Event(wall_time=time.time(), step=line["step"], summary=Summary(value=values)))


def _framed(event: Any) -> bytes:
    content = BytesIO()
    RecordWriter(content).write(event.SerializeToString())
    return content.getvalue()
