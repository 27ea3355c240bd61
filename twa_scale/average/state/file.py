"""The file of a run state: written atomically, with a checksum; the previous state is kept."""

import stat
from collections.abc import Callable, Mapping
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from twa_scale.average.state.schema import VERSION, RunState, checked
from twa_scale.errors import StateError
from twa_scale.output.publish import replace_file

STATE = "state.pt"
PREVIOUS = "state.previous.pt"
_MAGIC = b"twa_scale run state, version "
_FIX = "Restore a copy of it, or start a new run in another output or with resume=false."


def save_state(output: Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `output`/state.pt atomically. The previous state becomes state.previous.pt.

    Raises:
        StateError: `state` is invalid and could not be loaded, for example because a value is not finite.
        OutputError: the file cannot be written; the older files are unchanged.
    """
    checked(RunState, state, str(output / STATE))
    body = BytesIO()
    torch.save(dict(state), body)
    content = body.getvalue()
    try:
        before = _content(output / STATE)
        _body(output / STATE, before)
    except StateError:  # missing or damaged: keep the previous file
        pass
    else:
        replace_file(output / PREVIOUS, before)
    replace_file(output / STATE, _header(content) + content)


def load_state(output: Path, say: Callable[[str], object] = lambda _: None) -> RunState:
    """Read the file of `save_state`, without running code from it.

    If state.pt is missing or damaged, state.previous.pt is read instead, and reported by `say`.

    Args:
        output: the output directory of the run.
        say: called with one line of text.

    Raises:
        StateError: both files are missing or damaged, or written by another version of twa_scale.
    """
    try:
        return _load(output / STATE)
    except StateError as error:
        try:
            state = _load(output / PREVIOUS)
        except StateError:
            raise error from None
        say(f"{error} Until then {PREVIOUS} is used, the state of step {state.step}.")
        return state


def _load(path: Path) -> RunState:
    body = _body(path, _content(path))
    try:
        state = torch.load(BytesIO(body), map_location="cpu", weights_only=True)
    except Exception:  # the message of torch recommends an unsafe load
        raise StateError(f"{path}: is not a run state: it holds other things than plain data. {_FIX}") from None
    return checked(RunState, state, str(path))


def _content(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise StateError(f"{path}: is not a run state: it is not a regular file. {_FIX}")
        return path.read_bytes()
    except FileNotFoundError:
        raise StateError(f"{path}: there is no run state here; give the output directory of a run.") from None
    except OSError as error:
        raise StateError(f"{path}: cannot be read: {error.strerror}. {_FIX}") from None


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
            f"{path}: is not a run state of this twa_scale: it does not begin with {_MAGIC.decode()!r}. A twa_scale "
            f"before 0.1 wrote states without it; continue such a run with that. {_FIX}"
        )
    version = header[len(_MAGIC) :].partition(b",")[0]
    if header + b"\n" == _header(body):
        return body
    if version != str(VERSION).encode() and version.isdigit():
        raise StateError(
            f"{path}: has version {version.decode()} of the format, and this twa_scale reads version {VERSION}; or the "
            f"file is damaged. Continue with the twa_scale that wrote it. {_FIX}"
        )
    raise StateError(f"{path}: is damaged: its content does not have the checksum that was saved with it. {_FIX}")
