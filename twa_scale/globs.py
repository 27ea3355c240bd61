"""Patterns of paths, matched so that nothing is passed over in silence: what cannot be read is an error."""

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path

from twa_scale.errors import CandidateError, TwaError


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
    goes through links but not in circles. Names that begin with a dot are matched by patterns that do.

    Raises:
        OSError: a folder that cannot be read.
    """
    parts = pattern.parts
    literal = next((i for i in range(len(parts)) if not Path(*parts[: i + 1]).exists()), len(parts))
    root = Path(*parts[:literal])
    return root, sorted(set(_select(root, parts[literal:], frozenset())))


def _select(folder: Path, parts: tuple[str, ...], above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """Yield what `parts` match in a folder; `above` are the folders that `**` has come through."""
    if not parts:
        yield folder
        return
    first, rest = parts[0], parts[1:]
    if first == "**":
        stat = folder.stat()
        here = (stat.st_dev, stat.st_ino)
        if here in above:
            return
        yield from _select(folder, rest or ("*",), frozenset())
        for path in _entries(folder, "*"):
            if path.is_dir():
                yield from _select(path, parts, above | {here})
    elif has_magic(first):
        for path in _entries(folder, first):
            if not rest or path.is_dir():
                yield from _select(path, rest, frozenset())
    elif os.path.lexists(folder / first):
        yield from _select(folder / first, rest, frozenset())


def _entries(folder: Path, pattern: str) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if fnmatchcase(path.name, pattern) and path.name.startswith(".") <= pattern.startswith(".")
    ]
