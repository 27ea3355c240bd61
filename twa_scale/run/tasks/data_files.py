"""Which files hold the data of a split: patterns, the standard library, and a division by whole files."""

import hashlib
import sysconfig
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from twa_scale.base.inputs import named_errors
from twa_scale.base.notices import notice
from twa_scale.base.paths import folders_below, identity, leads_nowhere, matching, num_links, path_of
from twa_scale.config import Section
from twa_scale.errors import ConfigError
from twa_scale.run.tasks.task import SPLITS

READABLE = "Make it readable, or give patterns that leave it out."
STDLIB = "stdlib"
# Not on every installation, not Python's own, or written for the machine at hand.
_NOT_STDLIB = ("site-packages", "dist-packages", "test", "tests", "idle_test", "config-", "_sysconfigdata")

# Files that hold text in records, compressed, or none.
_NOT_TEXT = (
    *(".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".npy", ".npz", ".bin", ".idx", ".pt", ".pth", ".pkl"),
    *(".safetensors", ".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".pdf"),
)
_OTHER_FORMATS = (b"%PDF-", b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_SAMPLED = 4096  # bytes

Fraction = Annotated[float, Field(ge=0, le=1)]
Paths = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class Fractions(Section):
    """Parts of the files that each split gets, on average."""

    train: Fraction = Field(0.9, description="Part for training.")
    validation: Fraction = Field(0.05, description="Part for validation.")
    test: Fraction = Field(0.05, description="Part for testing.")

    @model_validator(mode="after")
    def _sum_to_one(self) -> "Fractions":
        if abs(self.train + self.validation + self.test - 1) > 1e-6:
            raise ValueError(f"{self.train}, {self.validation} and {self.test} do not sum to 1")
        return self


class SplitFiles(Section):
    """Files, globs or directories: one list that is divided by whole files, or one list for each split."""

    all: Paths = Field([], description="Divided over the splits by whole files; a list alone means this.")
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
    """Return the files of each split, every path found.

    A file's split follows from its name below the directory or pattern that named it, and from the seed: new
    files never move old ones to another split, and no file is in two, also where links lead to it.

    Args:
        files: Where to look.
        fractions: How to divide one list.
        seed: Seed of that division.
        suffixes: What names in a directory must end with, one of these.
        key: Setting to name in messages.

    Raises:
        ConfigError: a path or pattern that matches no file, or what cannot be read.
    """
    with named_errors(ConfigError, READABLE):
        if not files.all:
            found = {s: [path for path, _ in _find(getattr(files, s), suffixes, f"{key}.{s}")] for s in SPLITS}
            _tell_of_repeated(found, key)
            return found
        splits: dict[str, list[Path]] = {split: [] for split in SPLITS}
        for path, name in _find(files.all, suffixes, key):
            splits[_split_of(name, fractions, seed)].append(path)
        return splits


def _tell_of_repeated(splits: dict[str, list[Path]], key: str) -> None:
    """Report files that are in two splits, under whatever paths."""
    first: dict[tuple[int, ...], tuple[str, Path]] = {}
    for split, paths in splits.items():
        for path in paths:
            other, where = first.setdefault(identity(path), (split, path))
            if other != split:
                notice(f"{key}: {str(path)!r} of split {split!r} is {str(where)!r} of split {other!r}.")
                return


def require_text(path: Path) -> None:
    """Refuse a file that does not hold plain text: by its suffix, or for a zero byte near its start.

    Raises:
        ConfigError: naming the file.
    """
    reason = f"its suffix is {path.suffix}" if path.suffix.lower() in _NOT_TEXT else ""
    try:
        with path.open("rb") as file:
            start = file.read(_SAMPLED)
            if not reason and start.startswith(_OTHER_FORMATS):
                reason = "it begins as a PDF or a compressed file does"
            elif not reason and b"\0" in start:
                reason = "it holds zero bytes"
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
    if reason:
        raise ConfigError(
            f"{path}: is no plain text: {reason}. Extract its text into .txt files in UTF-8, or give patterns that "
            "leave it out: 'data/**/*.txt'. Files of tokens go under task.tokens."
        )


def _split_of(name: str, fractions: Fractions, seed: int) -> str:
    place = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") / 2**64
    if place < fractions.train:
        return "train"
    return "validation" if place < fractions.train + fractions.validation or fractions.test == 0 else "test"


def data_files(root: Path, suffixes: tuple[str, ...], without: tuple[str, ...] = ()) -> list[Path]:
    """Return what has one of the suffixes in a folder and in those below it, also behind links, sorted.

    Left out are names that begin with a dot or one of `without`. A link that leads nowhere and has another name may
    have led to a folder, and is reported.

    Raises:
        ConfigError: a link with one of the suffixes that leads nowhere.
        OSError: a folder that cannot be read.
    """
    found = sorted(path for _, paths in folders_below(root, without) for path in paths)
    named = [path for path in found if path.name.lower().endswith(suffixes)]
    lost = next((path for path in found if not path.name.lower().endswith(suffixes) and leads_nowhere(path)), None)
    if lost:
        notice(f"{lost}: is a link that leads nowhere. What may have been there is left out.")
    for path in named:
        refuse_lost(path)
    return named


def refuse_lost(path: Path) -> None:
    """Refuse a link that leads nowhere, which hides data.

    Raises:
        ConfigError: naming the link.
    """
    if leads_nowhere(path):
        raise ConfigError(f"{path}: is a link that leads nowhere, or in a circle. Remove it, or copy what it led to.")


def _find(entries: list[str], suffixes: tuple[str, ...], key: str) -> list[tuple[Path, str]]:
    """Return every file once, with the name that decides on its split: that on the path with the fewest links."""
    found: dict[tuple[int, ...], dict[Path, str]] = defaultdict(dict)
    for entry in entries:
        files = _standard_library() if entry == STDLIB else _matches(entry, suffixes)
        if not files:
            raise ConfigError(f"{key}: {entry!r} matches no file. Give files, globs or directories that exist.")
        for path, name in files:
            found[identity(path)].setdefault(path, name)
    kept = [(min(same, key=num_links) if len(same) > 1 else next(iter(same)), same) for same in found.values()]
    again = [(path, first) for first, same in kept for path in same if path != first]
    if again:
        path, first = again[0]
        more = f" (and {len(again) - 1} more like it)" if len(again) > 1 else ""
        notice(f"{key}: {str(path)!r} leads to the same file as {str(first)!r}{more}. Each file is read once.")
    return [(path, same[path]) for path, same in kept]


def _matches(entry: str, suffixes: tuple[str, ...]) -> list[tuple[Path, str]]:
    path = path_of(entry, ConfigError)
    if path.is_file():
        return [(path, path.name)]
    if path.is_dir():
        root, found = path, data_files(path, suffixes)
    else:
        root, found = matching(path)
        for match in found:
            refuse_lost(match)
    # A pipe would keep its reader waiting.
    return [(match, match.relative_to(root).as_posix()) for match in found if match.is_file()]


def _standard_library() -> list[tuple[Path, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    return [(path, path.relative_to(root).as_posix()) for path in data_files(root, (".py",), _NOT_STDLIB)]
