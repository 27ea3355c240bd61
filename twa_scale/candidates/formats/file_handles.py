"""Files that are read during the whole run, with a limit on the number of open descriptors."""

import errno
import os
import re
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from twa_scale.base.inputs import open_regular
from twa_scale.base.paths import identity_of
from twa_scale.errors import CandidateError

T = TypeVar("T")

_RULE = "candidates must not change until the run has ended."
_NO_DESCRIPTORS_LEFT = (errno.EMFILE, errno.ENFILE)  # no descriptor is left for this process or for the system


class File:
    """A regular file that any number of threads read at offsets.

    The file may be closed between two reads if many other files are in use. When it is opened again, it must be the
    same, unchanged file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._identity: tuple[int, ...] | None = None
        self._map: torch.Tensor | None = None
        with _OPEN_FILES.descriptor(self) as descriptor:
            self.size = os.fstat(descriptor).st_size

    @property
    def version(self) -> tuple[int, int]:
        """The size, and the time of the last change in nanoseconds, when the file was opened first."""
        assert self._identity is not None
        return self._identity[2], self._identity[3]

    def read(self, buffer: memoryview, offset: int, description: str) -> None:
        """Fill `buffer` with the bytes that begin at `offset`.

        Args:
            buffer: receives the bytes.
            offset: the first byte in the file.
            description: the name of the bytes in error messages.

        Raises:
            CandidateError: the file ends too early, or was changed or removed.
        """
        if not len(buffer):
            return
        with self.descriptor() as descriptor:
            problem = _read_exactly(descriptor, buffer, offset) or self._change(descriptor)
        if problem:
            raise self._error(f"{description} cannot be read", problem)

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """Yield a file descriptor that stays open until the `with` block ends."""
        with _OPEN_FILES.descriptor(self) as descriptor:
            yield descriptor

    def mapped(self, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return `count` elements that begin at `offset`, a multiple of their size, as a view of the mapped file.

        The mapping is private, so that nothing is written to the file, and needs no open descriptor.

        Raises:
            CandidateError: the file was changed since it was opened, or this process may not open another.
            OSError: the system refuses the mapping.
        """
        if self._map is None:
            with self.descriptor() as descriptor:
                try:
                    view = _OPEN_FILES.retried(self, lambda: _map(descriptor, self.size))
                finally:  # a change is also the reason for an error
                    if problem := self._change(descriptor):
                        raise self._error("cannot be mapped", problem)
                self._map = view
        return self._map[offset : offset + count * dtype.itemsize].view(dtype)

    def _change(self, descriptor: int) -> str | None:
        """Return how the file differs from the one that was opened first, or None if it does not."""
        current = os.fstat(descriptor)
        return change(self.size, current.st_size, written=identity_of(current) != self._identity)

    def _error(self, description: str, problem: str) -> CandidateError:
        return CandidateError(
            f"{self.path}: {description}: {problem}. The file was changed or removed while it was in use, or its disk "
            f"fails; {_RULE}"
        )

    def close(self) -> None:
        """Close the file. A later read opens it again; mapped tensors remain valid."""
        self._map = None
        _OPEN_FILES.drop(self)

    def open(self) -> int:
        """Open the file, check that it is unchanged, and return its descriptor. Only `_OpenFiles` calls this."""
        try:
            descriptor = open_regular(self.path)
        except OSError as error:
            if error.errno in _NO_DESCRIPTORS_LEFT:
                raise
            before = f", which could be read before; {_RULE}" if self._identity else "."
            raise CandidateError(f"{self.path}: cannot be opened: {error.strerror}{before}") from error
        identity = identity_of(os.fstat(descriptor))
        if self._identity not in (None, identity):
            os.close(descriptor)
            raise CandidateError(f"{self.path}: is not the file that it was when it was first opened; {_RULE}")
        self._identity = identity
        return descriptor


def change(previous: int, current: int, *, written: bool) -> str | None:
    """Return how a file differs from the one that was opened, by its sizes and whether it was written; else None."""
    if previous != current:
        return f"the file had {previous} bytes when it was opened and has {current} now"
    return "the file has been written since it was opened" if written else None


@dataclass
class _OpenFile:
    descriptor: int
    users: int = 0
    dropped: bool = False


class _OpenFiles:
    """The open files of this process, least recently used first, limited to a quarter of the system's limit."""

    def __init__(self) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = 512 if soft == resource.RLIM_INFINITY else max(8, min(512, soft // 4))
        self._lock = threading.RLock()  # `_add` calls `retried`
        self._open: OrderedDict[File, _OpenFile] = OrderedDict()

    @contextmanager
    def descriptor(self, file: File) -> Iterator[int]:
        with self._lock:
            entry = self._open.get(file) or self._add(file)
            self._open.move_to_end(file)
            entry.users += 1
        try:
            yield entry.descriptor
        finally:
            with self._lock:
                entry.users -= 1
                if entry.dropped and not entry.users:
                    os.close(entry.descriptor)

    def drop(self, file: File) -> None:
        with self._lock:
            if entry := self._open.pop(file, None):
                entry.dropped = True
                if not entry.users:  # otherwise the last reader closes it, so that its number is not reused meanwhile
                    os.close(entry.descriptor)

    def _add(self, file: File) -> _OpenFile:
        self._close_idle(self._limit - 1)
        self._open[file] = _OpenFile(self.retried(file, file.open))
        return self._open[file]

    def retried(self, file: File, opened: Callable[[], T]) -> T:
        """Return `opened()`, which opens `file`. If no descriptor is left, close unused files and try again.

        Raises:
            CandidateError: no descriptor is left after that.
        """
        with self._lock:
            try:
                return opened()
            except OSError as error:
                if error.errno not in _NO_DESCRIPTORS_LEFT:
                    raise
            self._close_idle(0)  # other code in this process has used up the system's limit
            try:
                return opened()
            except OSError as error:
                if error.errno not in _NO_DESCRIPTORS_LEFT:
                    raise
                raise CandidateError(
                    f"{file.path}: cannot be opened: {error.strerror}. Raise the limit with `ulimit -n`."
                ) from error

    def _close_idle(self, keep: int) -> None:
        """Close unused files, least recently used first, until at most `keep` are open."""
        for file in [file for file, entry in self._open.items() if not entry.users]:
            if len(self._open) <= keep:
                return
            os.close(self._open.pop(file).descriptor)


_OPEN_FILES = _OpenFiles()
_MAX_COPIED = 1 << 24  # bytes that are copied at a time if the system cannot read into a buffer


def _map(descriptor: int, size: int) -> torch.Tensor:
    """Map the first `size` bytes of an open file.

    Raises:
        OSError: the system refuses. Its number is taken from the message of torch, if possible.
    """
    try:  # the file that was opened, even if another one has its name now
        return torch.from_file(f"/dev/fd/{descriptor}", shared=False, size=size, dtype=torch.uint8)
    except RuntimeError as error:
        text = str(error)
        number = re.search(r": [^:]+ \((\d+)\)", text)
        raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(text)) from None


def _read_exactly(descriptor: int, buffer: memoryview, offset: int) -> str | None:
    """Fill `buffer` from the file. Return a description of the problem, or None on success."""
    done = 0
    while done < len(buffer):  # one call reads at most 2 GiB, and a network file system may return less
        try:
            count = _read(descriptor, buffer[done:], offset + done)
        except OSError as error:
            return error.strerror
        if count == 0:
            return f"it ends at byte {offset + done}, {len(buffer) - done} bytes too early"
        done += count
    return None


def _read(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read into the beginning of `buffer`, and return the number of bytes."""
    if hasattr(os, "preadv"):  # not in every macOS
        return os.preadv(descriptor, [buffer], offset)
    content = os.pread(descriptor, min(len(buffer), _MAX_COPIED), offset)
    buffer[: len(content)] = content
    return len(content)
