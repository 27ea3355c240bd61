"""Parquet and Arrow files, and datasets on disk of the library `datasets`, which are Arrow files."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twa_scale.base.inputs import open_regular, parse_json, text
from twa_scale.base.names import nearest
from twa_scale.errors import ConfigError
from twa_scale.run.tasks.packages import require_module

PARQUET = ".parquet"
SUFFIXES = (PARQUET, ".arrow")
_ROWS = 256  # the rows that are decoded at a time
_MAGIC_OF_FILES = b"ARROW1"  # other files are streams, as `datasets` writes them


def rows(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[str, list[Any]]]:
    """Yield (place, values of the columns) of each row. See `tables.rows`."""
    number = 0
    for batch in batches(path, columns):
        with named_errors(path):  # for values that Python cannot express, such as the year 30000
            of_columns = [batch.column(i).to_pylist() for i in range(len(columns))]
        for values in zip(*of_columns, strict=True):
            number += 1
            yield f"{path}, row {number}", list(values)


def batches(path: Path, columns: Mapping[str, str]) -> Iterator[Any]:
    """Yield pyarrow.RecordBatch objects with these columns, in the order of the file.

    Batches of Arrow files are views of the mapped file. Batches of parquet files are decoded, 256 rows at a time.
    Offsets and texts are checked, because damaged ones would end the process.

    Args:
        path: a parquet or Arrow file.
        columns: the name of each wanted column, by the setting that names it.

    Raises:
        ConfigError: pyarrow is not installed, the file cannot be read, or it lacks a column.
    """
    with named_errors(path):
        if path.suffix.lower() == PARQUET:
            file = open_parquet(path)
            require_columns(path, file.schema_arrow.names, columns)
            for batch in file.iter_batches(_ROWS, columns=list(columns.values())):
                batch.validate(full=True)
                yield batch
        else:
            reader, record_batches = _arrow(path)
            require_columns(path, reader.schema.names, columns)
            for batch in record_batches:
                selected = batch.select(list(columns.values()))
                selected.validate(full=True)
                yield selected


def has_lists(path: Path, column: str) -> bool:
    """Return whether a parquet or Arrow file has a column of this name that holds lists."""
    with named_errors(path):
        schema = _schema(path)
        return column in schema.names and _is_list(schema.field(column).type)


def is_compressed(path: Path) -> bool:
    """Return whether the first record batch of an Arrow file is decompressed, so that it is not a view of the file."""
    with named_errors(path):
        mapped = _mapped(path)
        file_buffer = mapped.read_buffer()
        mapped.seek(0)
        first = next(_read(mapped)[1], None)
        buffers = [buffer for column in (first.columns if first else ()) for buffer in column.buffers()]
        addresses = range(file_buffer.address, file_buffer.address + file_buffer.size + 1)
        return any(buffer.address not in addresses for buffer in buffers if buffer is not None and buffer.size)


def integer_lists(column: Any, path: Path, row: int, name: str, fix: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the integers of a column of lists, one list after the other, and the N + 1 bounds of its N lists.

    Both are views of the column, if it is not a list of fixed size.

    Args:
        column: a pyarrow.Array.
        path: its file, for error messages.
        row: the number of earlier rows of the file.
        name: the name of the column.
        fix: the fix if the column does not hold lists of integers, for error messages.

    Raises:
        ConfigError: the column does not hold lists of integers, or a value is missing.
    """
    types = pyarrow("pyarrow.types")
    if not _is_list(column.type) or not types.is_integer(column.type.value_type):
        raise ConfigError(f"{path}: the column {name!r} holds {column.type}, not lists of integers. {fix}")
    values = column.flatten()
    if column.null_count or values.null_count:
        empty = next(i for i, value in enumerate(column.to_pylist()) if value is None or None in value)
        raise ConfigError(f"{path}, row {row + empty + 1}: has no value in column {name!r}. Fill it in.")
    if types.is_fixed_size_list(column.type):
        bounds = np.arange(len(column) + 1) * column.type.list_size
    else:
        bounds = column.offsets.to_numpy()
        bounds = bounds - bounds[0] if len(bounds) else np.zeros(1, np.int64)
    return values.to_numpy(), bounds


def class_names(path: Path, column: str) -> list[str]:
    """Return the names of the classes of a `ClassLabel` in a file of the library `datasets`, or an empty list."""
    with named_errors(path):
        schema = _schema(path)
    try:
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [text(name) for name in features[column]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


def require_columns(location: str | Path, known: list[str], columns: Mapping[str, str]) -> None:
    """Check that a file or row has the columns.

    Raises:
        ConfigError: names the column, the setting and the nearest column.
    """
    for setting, column in columns.items():
        if column not in known:
            raise ConfigError(
                f"{location}: has no column {column!r}{nearest(column, known) or '.'} Its columns are "
                f"{', '.join(known)}; set {setting} to one of them."
            )


def pyarrow(module: str = "pyarrow") -> Any:
    """Return a module of pyarrow.

    Raises:
        ConfigError: it is not installed.
    """
    return require_module(module, "task: parquet and Arrow files need the package pyarrow", "twa-scale[data]")


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Replace errors of pyarrow in a `with` block by a ConfigError that names the file."""
    # ValueError includes UnicodeDecodeError, for names of columns.
    errors = (OSError, ValueError, OverflowError, pyarrow().ArrowException)
    try:
        yield
    except errors as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"{path}: cannot be read as a {path.suffix.lower()} file: {reason}. Repair it, or write it again."
        ) from error


def _mapped(path: Path) -> Any:
    os.close(open_regular(path, ConfigError))
    return pyarrow().memory_map(str(path))


def open_parquet(path: Path) -> Any:
    """Return a pyarrow.parquet.ParquetFile of a mapped file."""
    return pyarrow("pyarrow.parquet").ParquetFile(_mapped(path))


def _schema(path: Path) -> Any:
    return open_parquet(path).schema_arrow if path.suffix.lower() == PARQUET else _arrow(path)[0].schema


def _arrow(path: Path) -> tuple[Any, Iterator[Any]]:
    """Return the reader of an Arrow file, which has the schema, and its record batches."""
    return _read(_mapped(path))


def _read(mapped: Any) -> tuple[Any, Iterator[Any]]:
    ipc = pyarrow("pyarrow.ipc")
    if mapped.read(len(_MAGIC_OF_FILES)) == _MAGIC_OF_FILES:
        reader = ipc.open_file(mapped)
        return reader, (reader.get_batch(i) for i in range(reader.num_record_batches))
    mapped.seek(0)
    reader = ipc.open_stream(mapped)
    return reader, iter(reader)


def _is_list(kind: Any) -> bool:
    types = pyarrow("pyarrow.types")
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))
