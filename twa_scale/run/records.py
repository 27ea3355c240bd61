"""The metrics of a run, as JSON lines and for other loggers. Rank 0 only."""

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from twa_scale.config.kinds import LoggerName
from twa_scale.output import AppendedFile
from twa_scale.output.publish import output_errors
from twa_scale.run.csv_file import CsvFile
from twa_scale.run.services import Services

METRICS = "metrics.jsonl"


class Records:
    """A writer of metrics.jsonl and of the loggers in `report_to`. On other ranks it does nothing.

    A full disk does not stop a run: see `AppendedFile`. TensorBoard's own writer would raise an error in a thread.
    """

    def __init__(
        self,
        directory: Path,
        *,
        active: bool,
        step: int,
        log: Callable[[str], object],
        report_to: Sequence[LoggerName] = ("tensorboard",),
        services: Services | None = None,
    ) -> None:
        """Open the records of a run that continues at `step`. Lines that the run will write again are removed.

        Args:
            directory: the output directory of the run.
            active: whether this rank writes.
            step: the number of steps that are done.
            log: called with one line of text.
            report_to: the files that are written in addition to metrics.jsonl.
            services: the services that were started. Each line is sent to them.

        Raises:
            OutputError: the files cannot be created; an older metrics.jsonl is unchanged.
        """
        self._metrics: AppendedFile | None = None
        self._board: AppendedFile | None = None
        self._table: CsvFile | None = None
        self._services = services
        if not active:
            return
        known, damaged = _read(directory) if step else ([], 0)
        if damaged:
            log(f"{directory / METRICS}: {damaged} damaged lines were removed.")
        kept = [line for line in known if line["step"] < step or (line["step"] == step and "lr" in line)]
        lines = "".join(json.dumps(line) + "\n" for line in kept)
        self._metrics = AppendedFile(directory / METRICS, lines.encode(), log)
        if "csv" in report_to:
            self._table = CsvFile(directory, lambda: read_records(directory), log)
        if "tensorboard" in report_to:
            self._board = AppendedFile(directory / "tensorboard" / _event_file(), _opening(step), log)
            for line in kept:
                if line["step"] == step:  # the session log hides earlier events of this step
                    self._board.write(_scalars(line))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write one line."""
        if self._metrics is None:
            return
        line = {"step": step, **values}
        self._metrics.write((json.dumps(line) + "\n").encode())
        if self._table:
            self._table.write(line)
        if self._board:
            self._board.write(_scalars(line))
        if self._services:
            self._services.write(line)

    def close(self, *, finished: bool = True) -> None:
        """Close the files, after a last attempt to write lines that were delayed by a full disk, and end the services.

        Args:
            finished: whether the run has finished.
        """
        for file in (self._metrics, self._table, self._board):
            if file:
                file.close()
        if self._services:
            self._services.close(finished=finished)


def read_records(directory: Path) -> list[dict[str, Any]]:
    """Return the records that a run has written so far, without damaged lines."""
    return _read(directory)[0]


def _read(directory: Path) -> tuple[list[dict[str, Any]], int]:
    path = directory / METRICS
    if not path.is_file():
        return [], 0
    with output_errors(path):
        *complete, rest = path.read_bytes().split(b"\n")
    lines = [line for line in map(_record, complete) if line is not None]
    return lines, len(complete) - len(lines) + bool(rest)


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
