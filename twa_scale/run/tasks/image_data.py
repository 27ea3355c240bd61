"""The data of the task `image_classification`: the files of each split, and their labels."""

from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any, Literal

from twa_scale.base.inputs import named_errors
from twa_scale.base.paths import path_of
from twa_scale.errors import ConfigError
from twa_scale.run.tasks import arrow
from twa_scale.run.tasks.data_files import table_files
from twa_scale.run.tasks.labels import Label, class_labels, require_label
from twa_scale.run.tasks.saved_datasets import saved_files
from twa_scale.run.tasks.tables import is_table
from twa_scale.run.tasks.task import SPLITS

_KINDS = "Give an .npz file, a folder of classes, or parquet or Arrow files."


@dataclass(frozen=True)
class SplitData:
    """The data of a split."""

    kind: Literal["arrays", "folder", "table"]
    """An npz file, a folder with a subfolder for each class, or parquet and Arrow files."""
    paths: list[Path]
    """One file or folder, or the tables."""
    key: str
    """The setting in error messages."""


def data_of_splits(data: str | None, entries: dict[str, list[str]]) -> dict[str, SplitData]:
    """Return the data of each split.

    Args:
        data: an npz file or a folder with all splits, or None.
        entries: the files or folder of each split, if `data` is None.

    Raises:
        ConfigError: a path does not exist, or is of another kind.
    """
    with named_errors(ConfigError):
        if data is None:
            return {split: _split_data(paths, f"task.{split}") for split, paths in entries.items() if paths}
        root = path_of(data, ConfigError)
        if not root.is_dir():
            if not root.is_file():
                raise ConfigError(f"task.data: {root} does not exist. Give an .npz file or a folder.")
            return dict.fromkeys(SPLITS, SplitData("arrays", [root], "task.data"))
        splits = {s: _split_data([str(root / s)], f"task.{s}") for s in SPLITS if (root / s).is_dir()}
        if not splits:
            raise ConfigError(f"task.data: {root} has no subfolder {', '.join(SPLITS)}. Set a path for each split.")
        return splits


def _split_data(entries: list[str], key: str) -> SplitData:
    path = path_of(entries[0], ConfigError)
    if len(entries) == 1 and path.is_dir() and not saved_files(path):
        return SplitData("folder", [path], key)
    if len(entries) == 1 and path.is_file() and not is_table(path):
        return SplitData("arrays", [path], key)
    if len(entries) == 1 and not path.exists() and not is_table(path) and not has_magic(entries[0]):
        raise ConfigError(f"{key}: {path} does not exist. {_KINDS}")
    files = table_files(entries, key)
    if other := [file for file in files if file.suffix.lower() not in arrow.SUFFIXES]:
        raise ConfigError(f"{key}: {other[0]} cannot hold images. {_KINDS}")
    return SplitData("table", files, key)


def table_labels(files: list[Path], column: str, known: dict[str, int]) -> list[Label]:
    """Return the labels of all rows of tables.

    If the file has names for class numbers (`ClassLabel` of the library `datasets`), and the model knows these names,
    the labels are names, because the model may use other numbers.

    Args:
        files: parquet and Arrow files.
        column: the column of the labels.
        known: the `label2id` of the model.

    Raises:
        ConfigError: a file cannot be read, has no such column, or a label is missing or not a class.
    """
    labels: list[Any] = []
    for file in files:
        names = arrow.class_names(file, column)
        named = bool(names) and set(names) <= set(known)
        for location, (label,) in arrow.rows(file, {"task.label_key": column}):
            if label is None:
                raise ConfigError(f"{location}: has no value in column {column!r}. Fill it in, or remove the record.")
            require_label(label, location)
            labels.append(names[label] if named and isinstance(label, int) and 0 <= label < len(names) else label)
    return class_labels(labels)
