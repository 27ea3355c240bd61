"""Files of plain data that torch has written, read without running code from them."""

import stat
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from twa_scale.errors import StateError


def read_regular(path: Path, *, kind: str, fix: str) -> bytes | None:
    """Return the content of a regular file, or None if there is no file.

    Args:
        path: the file.
        kind: what the file should be, for messages: "a run state".
        fix: a sentence with the fix for a damaged file.

    Raises:
        StateError: it is not a regular file, or cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise StateError(f"{path}: is not {kind}: it is not a regular file. {fix}")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"{path}: cannot be read: {error.strerror}. {fix}") from None


def plain_data(path: Path, content: bytes, *, kind: str, fix: str) -> Any:
    """Return the data that `torch.save` has written, with tensors on the CPU.

    Args:
        path: the file that `content` is from.
        content: the content of the file.
        kind: as for `read_regular`.
        fix: as for `read_regular`.

    Raises:
        StateError: it is damaged, or contains other objects than plain data.
    """
    try:
        return torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # the message of torch recommends an unsafe load, and damage raises errors of many types
        raise StateError(
            f"{path}: is not {kind}: it is damaged, or contains other objects than plain data. {fix}"
        ) from None
