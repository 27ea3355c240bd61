"""Paths, patterns, and walks through directories in which an unreadable directory is an error."""

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path

from twa_scale.base.urls import is_url
from twa_scale.errors import CandidateError, TwaError

_NO_DATA = "lost+found"  # a directory of file systems that only root may read


def path_of(path: str | Path, error: type[TwaError] = CandidateError) -> Path:
    """Return the path that a user gave, with `~` expanded.

    Raises:
        TwaError: of type `error`: the text is empty or holds a zero byte, or the home directory is unknown.
    """
    text = str(path)
    if not text.strip() or "\0" in text:
        raise error(f"{text!r} is not a path. Is a variable of the shell empty?")
    if is_url(text):
        raise error(
            f"{text}: is a URL, and a path of this machine is needed here: only candidates are read from URLs. For an "
            "output, give a directory, and upload it when it is complete."
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as problem:
        raise error(f"{text}: {problem} Write the path out.") from None


def matching(pattern: Path) -> tuple[Path, list[Path]]:
    """Return the existing directory at the start of a pattern, and the paths that the pattern matches below it, sorted.

    Existing directories are taken literally, even if their names contain wildcards. `**` matches directories at any
    depth, and follows links except for cycles. Names that start with a dot are matched only by patterns that start with
    one, and `lost+found` only by its full name.

    Raises:
        OSError: a directory cannot be read.
    """
    parts = pattern.parts
    literal = next((i for i in range(len(parts)) if not Path(*parts[: i + 1]).exists()), len(parts))
    root = Path(*parts[:literal])
    return root, sorted(set(_select(root, parts[literal:])))


def subfolders(
    folder: Path, excluded: tuple[str, ...] = (), visited: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[tuple[Path, list[Path]]]:
    """Yield each directory from `folder` down, with its entries that are not directories.

    Links to directories are followed, except for cycles. Names that start with a dot or a prefix in `excluded` are
    skipped, and so is `lost+found`.

    Args:
        folder: the first directory.
        excluded: prefixes of names to skip.
        visited: device and inode of the directories above `folder`, to detect cycles.

    Raises:
        OSError: a directory cannot be read.
    """
    stat = folder.stat()
    key = (stat.st_dev, stat.st_ino)
    if key in visited:
        return
    folders: list[Path] = []
    others: list[Path] = []
    for path in entries(folder):
        if not path.name.startswith(excluded):
            (folders if path.is_dir() else others).append(path)
    yield folder, others
    for path in folders:
        yield from subfolders(path, excluded, visited | {key})


def is_dangling(path: Path) -> bool:
    """Return whether a path is a broken link or a cycle of links."""
    return path.is_symlink() and not path.exists()


def num_links(path: Path) -> int:
    """Return the number of symbolic links among a path and its parents."""
    return sum(part.is_symlink() for part in (path, *path.parents))


def identity(file: Path) -> tuple[int, int, int, int]:
    """Return an identifier of a file that is equal for all paths of the file."""
    return identity_of(file.stat())


def identity_of(stat: os.stat_result) -> tuple[int, int, int, int]:
    """Return the `identity` of the file with this `stat` result."""
    # Some network file systems give different files the same inode number, so size and time are included.
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _select(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    """Yield the paths below `folder` that the parts of a pattern match."""
    if not parts:
        yield folder
        return
    first, rest = parts[0], parts[1:]
    if first == "**":
        for subfolder, _ in subfolders(folder):
            yield from _select(subfolder, rest or ("*",))
    elif has_magic(first):
        for path in entries(folder, first):
            if not rest or path.is_dir():
                yield from _select(path, rest)
    elif os.path.lexists(folder / first):
        yield from _select(folder / first, rest)


def entries(folder: Path, pattern: str = "*") -> list[Path]:
    """Return the entries of a directory that match a pattern, sorted.

    Hidden names match only patterns that start with a dot, and `lost+found` is left out.

    Raises:
        OSError: the directory cannot be read.
    """
    return [
        path
        for path in sorted(folder.iterdir())
        if fnmatchcase(path.name, pattern)
        and path.name.startswith(".") <= pattern.startswith(".")
        and path.name != _NO_DATA
    ]
