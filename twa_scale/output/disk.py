"""Writing to files with early write-back to the disk."""

import ctypes
import errno
import os
import sys
from collections.abc import Iterator

_SYNC_FILE_RANGE_WRITE = 2  # Start the write-back of dirty pages without waiting for it.
_PIECE_BYTES = 8 << 20
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
        write_at(self._handle, data, offset)
        self._num_dirty += len(data)
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


def write_at(handle: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data` at byte `offset` of a file.

    Raises:
        OSError: the disk is full or fails.
    """
    view = memoryview(data)
    while len(view):  # One call writes at most 2 GiB, and a network file system may write less.
        count = os.pwrite(handle, view, offset)
        if count == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view, offset = view[count:], offset + count


def pieces_of(handle: int, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield the bytes [begin, end) of a file in pieces, each with its offset.

    Raises:
        OSError: the file ends before, or the disk fails.
    """
    while begin < end:
        piece = os.pread(handle, min(_PIECE_BYTES, end - begin), begin)
        if not piece:
            raise OSError(errno.EIO, "a file ends too early")
        yield begin, piece
        begin += len(piece)


def drop_cached_pages(path: str | os.PathLike[str]) -> None:
    """Drop the pages of a file that this machine has in memory, after they have been flushed to the disk.

    A client of NFS that has read a page and then writes a part of it may send the whole page, and so overwrite what
    another machine has written there in the meantime.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
