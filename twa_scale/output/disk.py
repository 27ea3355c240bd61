"""Writing to files with early write-back to the disk."""

import ctypes
import errno
import os
import sys

_SYNC_FILE_RANGE_WRITE = 2  # Start the write-back of dirty pages without waiting for it.
_WRITE_BACK_BYTES = 32 << 20  # bytes that are written before their write-back starts


class OpenFile:
    """An existing file that is written at any offset. Write-back to the disk starts while more data is written."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._handle = os.open(path, os.O_WRONLY)
        self._num_dirty = 0

    def write(self, data: memoryview, offset: int) -> None:
        """Write `data` at byte `offset`.

        Raises:
            OSError: the disk is full or fails.
        """
        done = 0
        while done < len(data):
            count = os.pwrite(self._handle, data[done:], offset + done)
            if count == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            done += count
        self._num_dirty += done
        if self._num_dirty >= _WRITE_BACK_BYTES:
            start_write_back(self._handle)
            self._num_dirty = 0

    def sync(self) -> None:
        """Flush all data to the disk."""
        os.fsync(self._handle)

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


def start_write_back(handle: int) -> None:
    """Start the write-back of a file's data on Linux, so that `sync` has less to wait for. `sync` reports errors."""
    if sys.platform == "linux" and (sync_range := getattr(ctypes.CDLL(None), "sync_file_range", None)):
        start, length = ctypes.c_int64(0), ctypes.c_int64(0)  # zeros stand for the whole file
        sync_range(ctypes.c_int(handle), start, length, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))
