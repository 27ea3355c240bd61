"""Directories that the library `datasets` writes with `save_to_disk`."""

from pathlib import Path
from typing import Any

from twa_scale.base.inputs import read_json_mapping
from twa_scale.base.names import quoted
from twa_scale.base.notices import notice
from twa_scale.errors import ConfigError

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}
_SPLIT_OF = {**_NAMES, "test": "test"}


def saved_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a saved dataset, in order, or an empty list for any other path.

    Other files of the directory are cached results of `map` and `filter`.

    Raises:
        ConfigError: the folder holds several splits, or a file is missing.
    """
    if not folder.is_dir():
        return []
    if (folder / _SPLITS).is_file():
        names = _read(folder / _SPLITS).get("splits", [])
        raise ConfigError(
            f"{folder}: is a DatasetDict with the splits {quoted(names)}. Give it alone, so that its splits are used, "
            f"or the directory of one split, such as {folder / str(next(iter(names), 'train'))}."
        )
    if not (folder / _STATE).is_file() or not (folder / _INFO).is_file():
        return []
    try:
        files = [folder / entry["filename"] for entry in _read(folder / _STATE)["_data_files"]]
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{folder / _STATE}: does not list `_data_files`. Save the dataset again.") from error
    if gone := [file.name for file in files if not file.is_file()]:
        raise ConfigError(f"{folder}: the files {quoted(gone)} that {_STATE} lists are missing. Copy it again.")
    return files


def saved_splits(folder: Path, key: str) -> dict[str, list[str]] | None:
    """Return the directory of each split of a saved DatasetDict, or None for any other path.

    Args:
        folder: the path.
        key: the setting in messages.

    Raises:
        ConfigError: none of its splits has the name of a split of a task.
    """
    if not (folder / _SPLITS).is_file():
        return None
    names = [str(name) for name in _read(folder / _SPLITS).get("splits", [])]
    splits = {_SPLIT_OF[name]: [str(folder / name)] for name in names if name in _SPLIT_OF}
    unused = [name for name in names if name not in _SPLIT_OF]
    if not splits:
        raise ConfigError(
            f"{key}: {folder} has the splits {quoted(names)}, none of which is train, validation or test. Give the "
            f"directory of each: {{train: {folder / names[0] if names else folder}}}."
        )
    if unused:
        notice(f"{key}: the splits {quoted(unused)} of {folder} are not used.")
    return splits


def used_files(folder: Path, files: list[Path]) -> list[Path]:
    """Return the files of a folder that hold data: all, or only those of a saved dataset."""
    names = {path.name for path in files}
    if _SPLITS in names or {_STATE, _INFO} <= names:
        return saved_files(folder)
    has_arrow = any(path.suffix == ".arrow" for path in files)
    return [path for path in files if not (has_arrow and path.name == _INFO)]


def _read(path: Path) -> dict[str, Any]:
    return read_json_mapping(path, ConfigError, "Save the dataset again.")
