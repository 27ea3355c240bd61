"""Files that others wrote, read with bounds: what a file claims does not decide how much time or memory we spend."""

import json
import os
import re
import reprlib
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twa_scale.errors import CandidateError, TwaError

MAX_JSON = 100_000_000
"""Most bytes of JSON: what the safetensors library accepts as a header."""
MAX_DEPTH = 64
"""Most levels of nesting in JSON and YAML."""
_MAX_VALUES = 10_000_000  # each takes some 60 bytes of memory

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_STRING = re.compile(rb'"[^"]*(?:"|\Z)')
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

_brief = reprlib.Repr()
_brief.maxlevel, _brief.maxstring, _brief.maxother, _brief.maxlong = 4, 80, 80, 40
brief = _brief.repr
"""Return `repr(value)`, shortened: for values of any size and depth in messages."""


def open_regular(path: str | Path, error: type[TwaError] = CandidateError) -> int:
    """Open a regular file for reading, and return its descriptor.

    Anything else is refused without being opened: a pipe would wait for a writer, and a device may never end.

    Raises:
        TwaError: of type `error`: not a regular file.
        OSError: a file that the system does not open.
    """
    try:
        _require_regular(path, Path(path).stat().st_mode, error)
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # it may have been replaced by a pipe meanwhile
    except ValueError as problem:  # no path of a file can hold a zero byte
        raise error(f"{str(path)!r}: cannot be the path of a file: {problem}.") from None
    try:
        _require_regular(path, os.fstat(handle).st_mode, error)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _require_regular(path: str | Path, mode: int, error: type[TwaError]) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise error(f"{path}: cannot be read: it is {kind}, not a regular file.")


def read_bounded(path: str | Path, limit: int, error: type[TwaError] = CandidateError) -> bytes:
    """Return the bytes of a regular file of at most `limit` bytes.

    Raises:
        TwaError: of type `error`: a file that cannot be read, is larger, or is not regular.
    """
    try:
        with os.fdopen(open_regular(path, error), "rb") as file:
            raw = file.read(limit + 1)
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}.") from problem
    if len(raw) > limit:
        raise error(f"{path}: is larger than {limit} bytes, the most that is read of such a file.")
    return raw


def parse_json(raw: bytes | bytearray) -> Any:
    """Parse UTF-8 JSON of bounded depth and number of values, in which each key of an object stands once.

    Raises:
        ValueError: anything else; its text says what.
    """
    unescaped = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    structure = _STRING.sub(b"0", unescaped)
    if structure.count(b",") + structure.count(b"[") + structure.count(b"{") > _MAX_VALUES:
        raise ValueError(f"it holds more than {_MAX_VALUES} values")
    if _depth(structure) > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique)
    if _SURROGATE.search(raw):
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no character, and cannot be printed
    return value


@contextmanager
def named_errors(error: type[TwaError] = CandidateError, fix: str = "") -> Iterator[None]:
    """Raise what the system says of a path in a `with` block as a TwaError of type `error`; `fix` is what to do."""
    try:
        yield
    except OSError as problem:
        said = f"{problem.filename or 'a file'}: cannot be read: {problem.strerror}."
        raise error(f"{said} {fix}".rstrip()) from problem


def integers(value: Any) -> tuple[int, ...]:
    """Return a list or tuple of integers of 64 bits as a tuple.

    Raises:
        ValueError: anything else, booleans included.
    """
    numbers = tuple(value) if isinstance(value, list | tuple) else None
    if numbers is None or any(type(n) is not int or not -1 << 63 <= n < 1 << 63 for n in numbers):
        raise ValueError(f"{brief(value)} is no list of 64-bit integers")
    return numbers


def text(value: Any) -> str:
    """Return a text as it is.

    Raises:
        ValueError: anything else.
    """
    if type(value) is not str:
        raise ValueError(f"{brief(value)} is no text")
    return value


def _depth(structure: bytes | bytearray) -> int:
    deepest = depth = 0
    for byte in re.sub(rb"[^][{}]+", b"", structure):
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth -= 1
            if depth < 0:
                raise ValueError("its brackets do not match")
    return deepest


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {brief(key)} is given twice; keep one")
        found[key] = value
    return found
