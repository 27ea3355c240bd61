"""Paths and patterns, and walks through folders that pass nothing over in silence: what cannot be read is an error."""

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path

from twa_scale.errors import CandidateError, TwaError

_NO_DATA = "lost+found"  # of a file system; only root may read it


def path_of(given: str | Path, error: type[TwaError] = CandidateError) -> Path:
    """Return a path that somebody has written, with `~` in its place.

    Raises:
        TwaError: of type `error`: no path, or a home that there is not.
    """
    text = str(given)
    if not text.strip() or "\0" in text:
        raise error(f"{text!r} is no path. Is a variable of the shell empty?")
    try:
        return Path(text).expanduser()
    except RuntimeError as problem:
        raise error(f"{text}: {problem} Write the path out.") from None


def matching(pattern: Path) -> tuple[Path, list[Path]]:
    """Return the folder in which a pattern begins to be one, and what it matches below, sorted.

    Folders that exist are no part of the pattern, whatever is in their names. `**` matches folders at any depth, and
    goes through links but not in circles. Names that begin with a dot are matched by patterns that do, and `lost+found`
    by its full name only.

    Raises:
        OSError: a folder that cannot be read.
    """
    parts = pattern.parts
    literal = next((i for i in range(len(parts)) if not Path(*parts[: i + 1]).exists()), len(parts))
    root = Path(*parts[:literal])
    return root, sorted(set(_select(root, parts[literal:])))


def folders_below(
    folder: Path, without: tuple[str, ...] = (), above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[tuple[Path, list[Path]]]:
    """Yield a folder with what it holds beside folders, then the folders below it at any depth in the same way.

    Links to folders are followed, but not in circles. Names that begin with a dot or one of `without` are passed over,
    and so is `lost+found`.

    Args:
        folder: where to begin.
        without: beginnings of names.
        above: device and inode of the folders on the way to this one.

    Raises:
        OSError: a folder that cannot be read.
    """
    stat = folder.stat()
    here = (stat.st_dev, stat.st_ino)
    if here in above:
        return
    folders: list[Path] = []
    others: list[Path] = []
    for path in entries(folder):
        if not path.name.startswith(without):
            (folders if path.is_dir() else others).append(path)
    yield folder, others
    for path in folders:
        yield from folders_below(path, without, above | {here})


def leads_nowhere(path: Path) -> bool:
    """Whether a path is a link to what is not there, or a link in a circle."""
    return path.is_symlink() and not path.exists()


def num_links(path: Path) -> int:
    """Return how many parts of a path are links."""
    return sum(part.is_symlink() for part in (path, *path.parents))


def identity(file: Path) -> tuple[int, int, int, int]:
    """Return what identifies a file, the same under each path that leads to it."""
    return identity_of(file.stat())


def identity_of(stat: os.stat_result) -> tuple[int, int, int, int]:
    """Return the `identity` of the file that the system says this of."""
    # Size and time as well: some network file systems give different files the same number.
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _select(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    """Yield what `parts` match in a folder."""
    if not parts:
        yield folder
        return
    first, rest = parts[0], parts[1:]
    if first == "**":
        for below, _ in folders_below(folder):
            yield from _select(below, rest or ("*",))
    elif has_magic(first):
        for path in entries(folder, first):
            if not rest or path.is_dir():
                yield from _select(path, rest)
    elif os.path.lexists(folder / first):
        yield from _select(folder / first, rest)


def entries(folder: Path, pattern: str = "*") -> list[Path]:
    """Return what matches a pattern in a folder, sorted; hidden names and `lost+found` by their names only.

    Raises:
        OSError: a folder that cannot be read.
    """
    return [
        path
        for path in sorted(folder.iterdir())
        if fnmatchcase(path.name, pattern)
        and path.name.startswith(".") <= pattern.startswith(".")
        and path.name != _NO_DATA
    ]
