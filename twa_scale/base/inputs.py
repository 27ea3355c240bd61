"""Reading untrusted files with bounds on time and memory."""

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
"""The maximum size of JSON in bytes, as for headers in the safetensors library."""
MAX_DEPTH = 64
"""The maximum depth of nesting in JSON and YAML."""
_MAX_VALUES = 10_000_000  # values of about 60 bytes of memory each

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
"""Return a shortened `repr(value)` for messages, whatever the size and depth of the value."""


def open_regular(path: str | Path, error: type[TwaError] = CandidateError) -> int:
    """Open a regular file for reading, and return its descriptor.

    Other kinds of files are not opened, because a pipe may wait for a writer and a device may be infinite.

    Raises:
        TwaError: of type `error`: `path` is not a regular file.
        OSError: the file cannot be opened.
    """
    try:
        _require_regular(path, Path(path).stat().st_mode, error)
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # A pipe may have replaced it since.
    except ValueError as problem:  # The path holds a zero byte.
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
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        TwaError: of type `error`: the file cannot be read, is larger than `limit`, or is not a regular file.
    """
    try:
        with os.fdopen(open_regular(path, error), "rb") as file:
            raw = file.read(limit + 1)
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}.") from problem
    if len(raw) > limit:
        raise error(f"{path}: is larger than {limit} bytes, the maximum for such a file.")
    return raw


def parse_json(raw: bytes | bytearray) -> Any:
    """Parse UTF-8 JSON of bounded depth and number of values, without duplicate keys.

    Raises:
        ValueError: the JSON is not valid, exceeds a bound, or has a duplicate key.
    """
    unescaped = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    structure = _STRING.sub(b"0", unescaped)
    if structure.count(b",") + structure.count(b"[") + structure.count(b"{") > _MAX_VALUES:
        raise ValueError(f"it holds more than {_MAX_VALUES} values")
    if _depth(structure) > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique)
    if _SURROGATE.search(raw):
        json.dumps(value, ensure_ascii=False).encode()  # Reject unpaired surrogates, which cannot be printed.
    return value


def read_json_mapping(path: Path, error: type[TwaError], fix: str) -> dict[str, Any]:
    """Return the content of a JSON file that holds values by name.

    Raises:
        TwaError: of type `error`, with `fix` as its last sentence: the file cannot be read, or its content is not a
            mapping.
    """
    try:
        content = parse_json(read_bounded(path, MAX_JSON, error))
    except ValueError as problem:
        raise error(f"{path}: is not valid JSON: {problem}. {fix}") from problem
    if not isinstance(content, dict):
        raise error(f"{path}: holds {type(content).__name__}, not a mapping of keys to values. {fix}")
    return content


@contextmanager
def named_errors(error: type[TwaError] = CandidateError, fix: str = "") -> Iterator[None]:
    """Replace an OSError of a `with` block by a TwaError of type `error` that names the path, the reason and `fix`."""
    try:
        yield
    except OSError as problem:
        reason = f"{problem.filename or 'a file'}: cannot be read: {problem.strerror}."
        raise error(f"{reason} {fix}".rstrip()) from problem


def integers(value: Any) -> tuple[int, ...]:
    """Return a list or tuple of 64-bit integers as a tuple.

    Raises:
        ValueError: `value` is not such a list, for example a list of booleans.
    """
    numbers = tuple(value) if isinstance(value, list | tuple) else None
    if numbers is None or any(type(n) is not int or not -1 << 63 <= n < 1 << 63 for n in numbers):
        raise ValueError(f"{brief(value)} is not a list of 64-bit integers")
    return numbers


def text(value: Any) -> str:
    """Return `value` if it is a string.

    Raises:
        ValueError: it is not.
    """
    if type(value) is not str:
        raise ValueError(f"{brief(value)} is not a text")
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
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {brief(key)} is given twice; keep one")
        result[key] = value
    return result
