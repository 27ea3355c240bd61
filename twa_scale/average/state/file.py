"""The file of a run state: written atomically, with a checksum, beside the state before it."""

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
    """Write `state` to `output`/state.pt: complete, or not at all. The state before it becomes state.previous.pt.

    Raises:
        StateError: `state` could not be loaded again, because a value in it is not finite.
        OutputError: the file could not be written; the older ones are as they were.
    """
    checked(RunState, state, str(output / STATE))
    body = BytesIO()
    torch.save(dict(state), body)
    content = body.getvalue()
    try:
        before = _content(output / STATE)
        _body(output / STATE, before)
    except StateError:  # there is none, or it is damaged: then the previous one is the better
        pass
    else:
        replace_file(output / PREVIOUS, before)
    replace_file(output / STATE, _header(content) + content)


def load_state(output: Path, say: Callable[[str], object] = lambda _: None) -> RunState:
    """Read what `save_state` wrote; nothing in the file is executed.

    When state.pt is missing or damaged and state.previous.pt is good, that is returned, and `say` is told so.

    Raises:
        StateError: both are missing or damaged, or of another version of twa_scale.
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
    except Exception:  # torch's own messages advise to load without a check
        raise StateError(f"{path}: is not a run state: it holds other things than plain data. {_FIX}") from None
    return checked(RunState, state, str(path))


def _content(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise StateError(f"{path}: is not a run state: it is no regular file. {_FIX}")
        return path.read_bytes()
    except FileNotFoundError:
        raise StateError(f"{path}: there is no run state here; give the output directory of a run.") from None
    except OSError as error:
        raise StateError(f"{path}: cannot be read: {error.strerror}. {_FIX}") from None


def _header(body: bytes) -> bytes:
    return _MAGIC + f"{VERSION}, {len(body)} bytes, sha256 {sha256(body).hexdigest()}\n".encode()


def _body(path: Path, content: bytes) -> bytes:
    """Return what stands behind the header, when it is what was written."""
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
