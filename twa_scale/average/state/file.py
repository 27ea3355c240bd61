"""The file of a run state: written atomically, with a checksum; the previous state is kept."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch

from twa_scale.average.state.plain_file import plain_data, read_regular
from twa_scale.average.state.rows_file import FIX, digest, remove_rows, rows_path
from twa_scale.average.state.schema import VERSION, RunState, StoredRows, checked
from twa_scale.errors import StateError
from twa_scale.output.publish import replace_file
from twa_scale.ranks import Group, Ranks

STATE = "state.pt"
PREVIOUS = "state.previous.pt"
_MAGIC = b"twa_scale run state, version "
_KIND = "a run state"


def save_state(output: Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `output`/state.pt atomically. The previous state becomes state.previous.pt. On one rank.

    Files of rows that neither of them names are removed.

    Raises:
        StateError: `state` is invalid and could not be loaded, for example because a value is not finite.
        OutputError: the file cannot be written; the older files are unchanged.
    """
    try:
        checked(RunState, state, str(output / STATE))
        body = BytesIO()
        torch.save(dict(state), body)
        content = body.getvalue()
        try:
            before = _content(output / STATE)
            _require_rows(output, _parsed(output / STATE, before))
        except StateError:  # missing or damaged: keep the previous file
            pass
        else:
            replace_file(output / PREVIOUS, before)
        replace_file(output / STATE, _header(content) + content)
    finally:
        remove_unused_rows(output)


def has_state(output: Path) -> bool:
    """Return whether `save_state` has written a file into `output`, damaged or not."""
    for name in (STATE, PREVIOUS):
        with suppress(OSError), (output / name).open("rb") as file:
            if file.read(len(_MAGIC)) == _MAGIC:
                return True
    return False


def load_state(
    output: Path, log: Callable[[str], object] = lambda _: None, *, rows: Literal["all", "size", "none"] = "all"
) -> RunState:
    """Read the file of `save_state`, without running code from it.

    If state.pt or its rows are missing or damaged, state.previous.pt is read instead, and reported by `log`.

    Args:
        output: the output directory of the run.
        log: called with one line of text.
        rows: the check of the file of rows. "all" reads it and compares its checksum, "size" checks that it exists and
            has its size, "none" does not check it.

    Raises:
        StateError: both files are missing or damaged, or written by another version of twa_scale.
    """
    try:
        return _load(output / STATE, rows)
    except StateError as error:
        try:
            state = _load(output / PREVIOUS, rows)
        except StateError:
            raise error from None
        log(f"{error} Until then {PREVIOUS} is used, the state of step {state.step}.")
        return state


def remove_unused_rows(output: Path) -> None:
    """Remove files of rows that no state names, which a killed process has left. On one rank, if no other run writes.

    Nothing is removed if a state cannot be read.
    """

    def used() -> set[str] | None:
        try:
            states = [_parsed(path, _content(path)) for path in (output / STATE, output / PREVIOUS) if path.exists()]
        except StateError:
            return None
        return {stored.directory for state in states if (stored := _stored_rows(state))}

    remove_rows(output, used)


def keep_loaded(output: Path, state: RunState) -> None:
    """Replace state.pt with state.previous.pt if `state` was loaded from it. On one rank, before the next save.

    A save keeps state.pt as the previous state. It checks only the size of its rows, and would keep a damaged one.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        if _stored_rows(_parsed(output / STATE, _content(output / STATE))) == _stored_rows(state):
            return
    except StateError:  # a save does not keep a damaged state
        return
    replace_file(output / STATE, _content(output / PREVIOUS))


def forget_state(output: Path) -> None:
    """Remove the states of another run, so that a later start does not resume from them. On one rank."""
    for name in (PREVIOUS, STATE):
        (output / name).unlink(missing_ok=True)
    remove_unused_rows(output)


def require_stored_rows(directory: Path, stored: StoredRows, group: Ranks) -> None:
    """Check that a file of rows is the one that was saved. Collective: each rank reads a part of it.

    Args:
        directory: the directory of the state.
        stored: the description of the file in the state.
        group: the ranks that read.

    Raises:
        StateError: the file is missing or damaged; on every rank.
    """
    rows_directory = directory / stored.directory
    actual = digest(rows_directory, group)
    with group.agree():
        if actual != (stored.nbytes, stored.sha256):
            raise StateError(
                f"{rows_path(rows_directory)}: is damaged: its content does not have the checksum that was saved in "
                f"the state. {FIX}"
            )


def _stored_rows(state: RunState) -> StoredRows | None:
    return None if state.twa.rows is None else state.twa.rows.stored


def _require_rows(output: Path, state: RunState) -> None:
    """Check that the file of rows exists and has its size, without reading all of it."""
    stored = _stored_rows(state)
    path = stored and rows_path(output / stored.directory)
    if stored and path and not (path.is_file() and path.stat().st_size == stored.nbytes):
        raise StateError(f"{path}: is missing or damaged. {FIX}")


def _load(path: Path, rows: Literal["all", "size", "none"]) -> RunState:
    state = _parsed(path, _content(path))
    if rows == "size":
        _require_rows(path.parent, state)
    elif rows == "all" and (stored := _stored_rows(state)):
        require_stored_rows(path.parent, stored, Group.alone())
    return state


def _parsed(path: Path, content: bytes) -> RunState:
    return checked(RunState, plain_data(path, _body(path, content), kind=_KIND, fix=FIX), str(path))


def _content(path: Path) -> bytes:
    content = read_regular(path, kind=_KIND, fix=FIX)
    if content is None:
        raise StateError(f"{path}: there is no run state here; give the output directory of a run.")
    return content


def _header(body: bytes) -> bytes:
    return _MAGIC + f"{VERSION}, {len(body)} bytes, sha256 {sha256(body).hexdigest()}\n".encode()


def _body(path: Path, content: bytes) -> bytes:
    """Return the content after the header.

    Raises:
        StateError: the header is missing or of another version, or the checksum differs.
    """
    header, _, body = content.partition(b"\n")
    if not header.startswith(_MAGIC):
        raise StateError(
            f"{path}: is not a run state of this twa_scale: it does not begin with {_MAGIC.decode()!r}. twa_scale "
            f"before 0.1 wrote states without it; continue such a run with that version. {FIX}"
        )
    version = header[len(_MAGIC) :].partition(b",")[0]
    if header + b"\n" == _header(body):
        return body
    if version != str(VERSION).encode() and version.isdigit():
        raise StateError(
            f"{path}: has version {version.decode()} of the format, and this twa_scale reads version {VERSION}; or the "
            f"file is damaged. Continue with the twa_scale that wrote it. {FIX}"
        )
    raise StateError(f"{path}: is damaged: its content does not have the checksum that was saved with it. {FIX}")
