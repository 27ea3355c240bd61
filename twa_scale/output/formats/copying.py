"""Copies of files in bounded memory."""

import os
from collections.abc import Sequence
from pathlib import Path

from twa_scale.base.inputs import open_regular
from twa_scale.errors import OutputError

_PIECE_BYTES = 8 << 20


def copy_file(source: Path, target: Path, without: Sequence[tuple[int, int]] = ()) -> None:
    """Copy a file and flush it to the disk. The folder of the target is created.

    Args:
        source: a regular file.
        target: a file that does not exist.
        without: ranges of bytes that are not copied, but become holes.

    Raises:
        OSError: the disk is full or fails.
        OutputError: the source is not a regular file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(open_regular(source, OutputError), "rb", buffering=0) as old, target.open("wb", buffering=0) as new:
        size = os.fstat(old.fileno()).st_size
        position = 0
        for begin, end in [*sorted(without), (size, size)]:
            _copy(old.fileno(), new.fileno(), position, begin)
            position = max(position, end)
        new.truncate(size)
        os.fsync(new.fileno())


def _copy(old: int, new: int, begin: int, end: int) -> None:
    while begin < end:
        piece = os.pread(old, min(_PIECE_BYTES, end - begin), begin)
        if not piece:
            raise OSError("a file that is copied has become shorter")
        done = 0
        while done < len(piece):
            done += os.pwrite(new, memoryview(piece)[done:], begin + done)
        begin += done
