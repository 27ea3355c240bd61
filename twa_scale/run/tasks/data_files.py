"""The files of each split: patterns, Python's standard library, and the division of one list by whole files."""

import hashlib
import sysconfig
from collections import defaultdict
from collections.abc import Mapping
from glob import has_magic
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from twa_scale.base.inputs import named_errors
from twa_scale.base.notices import notice
from twa_scale.base.paths import identity, is_dangling, matching, num_links, path_of, subfolders
from twa_scale.config import Section
from twa_scale.errors import ConfigError
from twa_scale.run.tasks.saved_datasets import saved_files, saved_splits, used_files
from twa_scale.run.tasks.tables import require_table
from twa_scale.run.tasks.task import SPLITS

READABLE = "Make it readable, or give patterns that leave it out."
STDLIB = "stdlib"
# Folders and files that are not on every installation, not part of Python, or specific to the machine.
_NOT_STDLIB = ("site-packages", "dist-packages", "test", "tests", "idle_test", "config-", "_sysconfigdata")

# Suffixes of files that are compressed, or hold no text.
_NOT_TEXT = (
    *(".feather", ".npy", ".npz", ".bin", ".idx", ".pt", ".pth", ".pkl"),
    *(".safetensors", ".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".pdf"),
)
_OTHER_FORMATS = (b"%PDF-", b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_SAMPLED = 4096  # bytes

Fraction = Annotated[float, Field(ge=0, le=1)]
Paths = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class Fractions(Section):
    """The expected fraction of the files in each split."""

    train: Fraction = Field(0.9, description="Fraction for training.")
    validation: Fraction = Field(0.05, description="Fraction for validation.")
    test: Fraction = Field(0.05, description="Fraction for testing.")

    @model_validator(mode="after")
    def _sum_to_one(self) -> "Fractions":
        if abs(self.train + self.validation + self.test - 1) > 1e-6:
            raise ValueError(f"{self.train}, {self.validation} and {self.test} do not sum to 1")
        return self


class SplitFiles(Section):
    """Files, globs or directories: one list that is divided over the splits, or one list for each split."""

    all: Paths = Field([], description="Files that are divided over the splits. A plain list means this.")
    train: Paths = Field([], description="Files of the training data.")
    validation: Paths = Field([], description="Files of the validation data.")
    test: Paths = Field([], description="Files of the test data.")

    @model_validator(mode="before")
    @classmethod
    def _bare_list(cls, value: Any) -> Any:
        return {"all": value} if isinstance(value, str | list) else value

    @model_validator(mode="after")
    def _one_way(self) -> "SplitFiles":
        if bool(self.all) == bool(self.train or self.validation or self.test):
            raise ValueError("give one list of paths, or lists for `train`, `validation` and `test`")
        return self


def split_files(
    files: SplitFiles, fractions: Fractions, seed: int, suffixes: tuple[str, ...], key: str
) -> dict[str, list[Path]]:
    """Return the files of each split.

    The split of a file depends only on the seed and on its path relative to the directory or pattern that matched it.
    New files do not move other files to another split, and no file is in two splits, even if links lead to it.

    Args:
        files: the files, globs and directories.
        fractions: the fractions of the splits, if one list is divided.
        seed: the seed of that division.
        suffixes: the suffixes of files that are used in directories.
        key: the setting in error messages.

    Raises:
        ConfigError: a path or pattern matches no file, or a folder cannot be read.
    """
    with named_errors(ConfigError, READABLE):
        if splits_on_disk := len(files.all) == 1 and saved_splits(path_of(files.all[0], ConfigError), key):
            files = SplitFiles.model_validate(splits_on_disk)
        if not files.all:
            return {s: [path for path, _ in _find(getattr(files, s), suffixes, f"{key}.{s}")] for s in SPLITS}
        splits: dict[str, list[Path]] = {split: [] for split in SPLITS}
        for path, name in _find(files.all, suffixes, key):
            splits[_split_of(name, fractions, seed)].append(path)
        return splits


def report_shared_files(sources: Mapping[str, Mapping[str, list[Path]]]) -> None:
    """Report a file that is in two splits, even under different paths or in different sources.

    Args:
        sources: the files of each split, by the setting of their source.

    Raises:
        ConfigError: a file no longer exists.
    """
    first: dict[tuple[int, ...], tuple[str, Path]] = {}
    for key, splits in sources.items():
        for split, paths in splits.items():
            for path in paths:
                with named_errors(ConfigError, READABLE):
                    other, location = first.setdefault(identity(path), (split, path))
                if other != split:
                    notice(f"{key}: {str(path)!r} of split {split!r} is {str(location)!r} of split {other!r}.")
                    return


def require_text(path: Path) -> None:
    """Check that a file holds plain text, by its suffix and its first bytes.

    Raises:
        ConfigError: names the file.
    """
    reason = f"its suffix is {path.suffix}" if path.suffix.lower() in _NOT_TEXT else ""
    try:
        with path.open("rb") as file:
            start = file.read(_SAMPLED)
            if not reason and start.startswith(_OTHER_FORMATS):
                reason = "it begins like a PDF or a compressed file"
            elif not reason and b"\0" in start:
                reason = "it holds zero bytes"
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
    if reason:
        raise ConfigError(
            f"{path}: is not plain text: {reason}. Extract its text into .txt files in UTF-8, or give patterns that "
            "leave it out: 'data/**/*.txt'. Give files of tokens as task.tokens."
        )


def _split_of(name: str, fractions: Fractions, seed: int) -> str:
    uniform = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") / 2**64
    if uniform < fractions.train:
        return "train"
    return "validation" if uniform < fractions.train + fractions.validation or fractions.test == 0 else "test"


def data_files(root: Path, suffixes: tuple[str, ...], excluded: tuple[str, ...] = ()) -> list[Path]:
    """Return all files with one of the suffixes in a folder and its subfolders, sorted. Links are followed.

    Names that begin with a dot or with one of `excluded` are left out. A dangling link without one of the suffixes may
    have been a link to a folder, and is reported.

    Raises:
        ConfigError: a link with one of the suffixes is dangling.
        OSError: a folder cannot be read.
    """
    matching_paths = sorted(path for folder, paths in subfolders(root, excluded) for path in used_files(folder, paths))
    named = [path for path in matching_paths if path.name.lower().endswith(suffixes)]
    dangling = next(
        (path for path in matching_paths if not path.name.lower().endswith(suffixes) and is_dangling(path)), None
    )
    if dangling:
        notice(f"{dangling}: is a dangling link. If its target was a folder of data, that data is left out.")
    for path in named:
        refuse_dangling(path)
    return named


def table_files(entries: list[str], key: str) -> list[Path]:
    """Return the tables that paths, patterns and directories of `datasets.save_to_disk` name, in order.

    Args:
        entries: the paths and patterns.
        key: the setting in error messages.

    Raises:
        ConfigError: a pattern matches no file, or a file cannot be read or is not a table.
    """
    tables = []
    for entry in entries:
        path = path_of(entry, ConfigError)
        with named_errors(ConfigError, READABLE):
            matches = matching(path)[1] if has_magic(entry) and not path.exists() else [path]
            files = [file for match in matches for file in (saved_files(match) or [match])]
        if not files:
            raise ConfigError(f"{key}: {entry!r} matches no file. Give files that exist.")
        for file in files:
            require_table(file, key)
        tables += files
    return tables


def refuse_dangling(path: Path) -> None:
    """Refuse a dangling link, because data would be missing.

    Raises:
        ConfigError: names the link.
    """
    if is_dangling(path):
        raise ConfigError(f"{path}: is a dangling link, or a link to itself. Remove it, or restore its target.")


def _find(entries: list[str], suffixes: tuple[str, ...], key: str) -> list[tuple[Path, str]]:
    """Return each file once, with its relative path that determines the split.

    Of several paths to the same file, the one with the fewest links is used.
    """
    by_identity: dict[tuple[int, ...], dict[Path, str]] = defaultdict(dict)
    for entry in entries:
        files = _standard_library() if entry == STDLIB else _matches(entry, suffixes)
        if not files:
            raise ConfigError(f"{key}: {entry!r} matches no file. Give files, globs or directories that exist.")
        for path, name in files:
            by_identity[identity(path)].setdefault(path, name)
    kept = [(min(same, key=num_links) if len(same) > 1 else next(iter(same)), same) for same in by_identity.values()]
    repeated = [(path, first) for first, same in kept for path in same if path != first]
    if repeated:
        path, first = repeated[0]
        more = f" (and {len(repeated) - 1} more like it)" if len(repeated) > 1 else ""
        notice(f"{key}: {str(path)!r} leads to the same file as {str(first)!r}{more}. Each file is read once.")
    return [(path, same[path]) for path, same in kept]


def _matches(entry: str, suffixes: tuple[str, ...]) -> list[tuple[Path, str]]:
    path = path_of(entry, ConfigError)
    if path.is_file():
        return [(path, path.name)]
    if not path.exists() and suffixes != ("",) and (tokens := path.with_name(f"{path.name}.bin")).is_file():
        return [(tokens, tokens.name)]  # Megatron-LM names both files of a data set by their common prefix
    if path.is_dir():
        root, paths = path, data_files(path, suffixes)
    else:
        root, paths = matching(path)
        for match in paths:
            refuse_dangling(match)
        paths = [file for match in paths for file in (saved_files(match) or [match])]
    # `is_file` leaves out named pipes, which would block the reader. A .bin file is read with its index.
    paths = [match for match in paths if match.is_file() and not _is_index(match)]
    return [(match, match.relative_to(root).as_posix()) for match in paths]


def _is_index(path: Path) -> bool:
    return path.suffix.lower() == ".idx" and path.with_suffix(".bin").exists()


def _standard_library() -> list[tuple[Path, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    return [(path, path.relative_to(root).as_posix()) for path in data_files(root, (".py",), _NOT_STDLIB)]
