"""The metrics of a run as a table, metrics.csv."""

import csv
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from twa_scale.errors import OutputError
from twa_scale.output import AppendedFile

CSV = "metrics.csv"


class CsvFile:
    """A row for each line of metrics.jsonl and a column for each metric. A new metric causes the file to be rewritten.

    Args:
        directory: the directory of the run.
        known: returns all lines of metrics.jsonl so far.
        log: called with one line of text.

    Raises:
        OutputError: the file cannot be created.
    """

    def __init__(
        self, directory: Path, known: Callable[[], Sequence[Mapping[str, Any]]], log: Callable[[str], object]
    ) -> None:
        self._path = directory / CSV
        self._known = known
        self._log = log
        self._columns = ["step"]
        self._file = self._made()
        self._is_stale = False

    def write(self, line: Mapping[str, Any]) -> None:
        """Append the row of a line that metrics.jsonl already has."""
        if not self._is_stale and set(line) <= set(self._columns):
            self._file.write(_row([line.get(name, "") for name in self._columns]))
            return
        try:
            self._file = self._made()
            self._is_stale = False
        except OutputError as error:
            if not self._is_stale:
                self._log(f"{error} The run continues; the file is rewritten when there is space.")
            self._is_stale = True

    def close(self) -> None:
        """Write the rows that were delayed by a full disk."""
        if not self._is_stale:
            self._file.close()

    def _made(self) -> AppendedFile:
        lines = self._known()
        self._columns = list(dict.fromkeys([*self._columns, *(name for line in lines for name in line)]))
        rows = [self._columns, *([line.get(name, "") for name in self._columns] for line in lines)]
        return AppendedFile(self._path, b"".join(map(_row, rows)), self._log)


def _row(cells: Sequence[object]) -> bytes:
    text = StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()
