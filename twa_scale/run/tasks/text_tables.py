"""Columns of CSV, TSV and JSONL files."""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from twa_scale.base.inputs import open_regular, parse_json
from twa_scale.base.names import nearest
from twa_scale.errors import ConfigError

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_columns(path: Path, columns: Sequence[str], where: str) -> list[list[Any]]:
    """Return the values of each column, in file order. CSV and TSV files have a header, and their values are strings.

    Args:
        path: the file.
        columns: the names of the columns.
        where: the setting in error messages.

    Raises:
        ConfigError: the file is missing, empty, malformed or of another format, or a row lacks a column.
    """
    if path.suffix.lower() not in (*_DELIMITERS, ".jsonl"):
        raise ConfigError(f"{where}: {path} is not .csv, .tsv or .jsonl. Convert it to one of these.")
    values: list[list[Any]] = [[] for _ in columns]
    try:
        with os.fdopen(open_regular(path, ConfigError), encoding="utf-8-sig", newline="") as file:
            for line, row in _rows(file, path):
                for column, into in zip(columns, values, strict=True):
                    if row.get(column) is None:
                        raise ConfigError(_missing(path, line, column, row))
                    into.append(row[column])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{where}: {path} cannot be read: {error}.") from error
    if not values[0]:
        raise ConfigError(f"{where}: {path} holds no examples.")
    return values


def _rows(file: TextIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if delimiter := _DELIMITERS.get(path.suffix.lower()):
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        names = reader.fieldnames or ()
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"{path}: has two columns called {twice!r}. Rename or remove one.")
        for row in reader:
            if None in row:
                raise ConfigError(
                    f"{path}, line {reader.line_num}: has more values than the {len(names)} columns. Quote texts that "
                    "contain a delimiter."
                )
            yield reader.line_num, row
        return
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, _json_object(line, f"{path}, line {number}")


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = parse_json(line.encode())
    except ValueError as error:
        raise ConfigError(f"{where}: is not JSON: {error}. Write one object per line.") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: holds {type(row).__name__}. Write one object per line.")
    return row


def _missing(path: Path, line: int, column: str, row: dict[str, Any]) -> str:
    known = [key for key in row if key]
    if column in known:
        return f"{path}, line {line}: has no value in column {column!r}. Fill it in, or remove the line."
    return (
        f"{path}, line {line}: has no column {column!r}{nearest(column, known) or '.'} Its columns are "
        f"{', '.join(known)}; set `text` or `label` to one of them."
    )
