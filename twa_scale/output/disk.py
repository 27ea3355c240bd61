"""Bytes on their way to a disk."""

import ctypes
import errno
import os
import sys

_START = 2  # SYNC_FILE_RANGE_WRITE: start what is not under way yet, and wait for nothing
_BEHIND = 32 << 20  # bytes that wait in memory at most before the disk is given work


class OpenFile:
    """A file that exists, written at any place, whose bytes are on their way to the disk while more are written."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._handle = os.open(path, os.O_WRONLY)
        self._behind = 0

    def write(self, data: memoryview, offset: int) -> None:
        """Write bytes from `offset` on.

        Raises:
            OSError: the disk is full, or fails.
        """
        done = 0
        while done < len(data):
            count = os.pwrite(self._handle, data[done:], offset + done)
            if count == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            done += count
        self._behind += done
        if self._behind >= _BEHIND:
            start_writing(self._handle)
            self._behind = 0

    def sync(self) -> None:
        """Make what was written survive a power cut."""
        os.fsync(self._handle)

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


def start_writing(handle: int) -> None:
    """Let the disk begin with what was written to a file; else it would wait for `sync`, and `sync` for all of it.

    Linux alone can be asked; errors come to light in `sync`.
    """
    if sys.platform == "linux" and (start := getattr(ctypes.CDLL(None), "sync_file_range", None)):
        start(ctypes.c_int(handle), ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(_START))  # 0, 0: the whole file
