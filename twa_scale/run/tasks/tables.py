"""Rows of CSV, TSV, JSONL, parquet and Arrow files, read in order and in pieces."""

import csv
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from twa_scale.base.inputs import MAX_JSON, open_regular, parse_json
from twa_scale.errors import ConfigError
from twa_scale.run.tasks import arrow
from twa_scale.run.tasks.json_arrays import array_items

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LINES = (".jsonl", ".ndjson", ".json")
_GZIP = ".gz"
_START = 1024  # characters of a .json file that are read to distinguish an array from lines
FORMATS = (*_DELIMITERS, *_LINES, *(ending + _GZIP for ending in (*_DELIMITERS, *_LINES)), *arrow.SUFFIXES)
"""The endings of the names of files that are read as tables."""

Row = tuple[str, list[Any]]
"""The place of a row for messages, such as "data.csv, line 2", and the values of the wanted columns."""


def is_table(path: Path, formats: tuple[str, ...] = FORMATS) -> bool:
    """Return whether a file has the name of a table."""
    return path.name.lower().endswith(formats)


def rows(path: Path, columns: Mapping[str, str], key: str) -> Iterator[Row]:
    """Yield the rows of a file in order. CSV and TSV files have a header, and their values are strings.

    Args:
        path: the file.
        columns: the name of each wanted column, by the setting that names it.
        key: the setting in error messages.

    Raises:
        ConfigError: the file is missing, malformed or of another format, or a row lacks a column.
    """
    if path.suffix.lower() in arrow.SUFFIXES:
        require_table(path, key)
        entries = arrow.rows(path, columns)
    else:
        entries = _columns(records(path, key), columns)
    for location, values in entries:
        for column, value in zip(columns.values(), values, strict=True):
            if value is None:
                raise ConfigError(f"{location}: has no value in column {column!r}. Fill it in, or remove the record.")
        yield location, values


def records(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, values by column) of the rows of a CSV, TSV, JSONL or JSON file in order.

    Args:
        path: the file.
        key: the setting in error messages.

    Raises:
        ConfigError: the file is missing, malformed or of another format.
    """
    require_table(path, key)
    try:
        with _open_text(path) as file:
            yield from _dicts(file, path)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error}.") from error


def require_table(path: Path, key: str) -> None:
    """Check that a file can be read and has the name of a table.

    Raises:
        ConfigError: names the setting `key` and the file.
    """
    if not is_table(path):
        raise ConfigError(
            f"{key}: {path} is not .csv, .tsv, .jsonl, .parquet or .arrow, nor a directory of datasets.save_to_disk. "
            "Convert it to one of these."
        )
    try:
        os.close(open_regular(path, ConfigError))
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error}.") from error


def _columns(entries: Iterator[tuple[str, dict[str, Any]]], columns: Mapping[str, str]) -> Iterator[Row]:
    for location, row in entries:
        arrow.require_columns(location, [key for key in row if key], columns)
        yield location, [row[column] for column in columns.values()]


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    with os.fdopen(open_regular(path, ConfigError), "rb") as file:
        raw = gzip.GzipFile(fileobj=file) if path.suffix.lower() == _GZIP else file
        yield io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")


def _dicts(file: TextIO, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    ending = Path(path.name.lower().removesuffix(_GZIP)).suffix
    if delimiter := _DELIMITERS.get(ending):
        # A limit of the whole process; texts exceed the default of 131072 characters.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_JSON))
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        names = reader.fieldnames or ()
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"{path}: has two columns called {repeated!r}. Rename or remove one.")
        for row in reader:
            location = f"{path}, line {reader.line_num}"
            if None in row:
                raise ConfigError(
                    f"{location}: has more values than the {len(names)} columns. Quote texts that contain a delimiter."
                )
            yield location, row
        return
    start = file.read(_START) if ending == ".json" else ""
    if start.lstrip().startswith("["):
        yield from _of_array(file, start, path)
        return
    file.seek(0)
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"{path}, line {number}", _json_object(line, f"{path}, line {number}")


def _of_array(file: TextIO, start: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    location = f"{path}, item 1"
    try:
        for number, item in enumerate(array_items(file, start), 1):
            yield location, _json_object(item, location)
            location = f"{path}, item {number + 1}"
    except ValueError as error:
        raise ConfigError(f"{location}: is not JSON: {error}. Write an array of objects.") from error


def _json_object(line: str, key: str) -> dict[str, Any]:
    try:
        row = parse_json(line.encode())
    except ValueError as error:
        raise ConfigError(f"{key}: is not JSON: {error}. Write one object per line.") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{key}: holds {type(row).__name__}. Write one object per line.")
    return row
