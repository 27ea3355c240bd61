"""Files that are read for as long as a run lasts, of which only a few are open at a time."""

import errno
import mmap
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from twa_scale.base.inputs import open_regular
from twa_scale.base.paths import identity_of
from twa_scale.errors import CandidateError

_STEADY = "candidates must stay as they are until the run has ended."


class File:
    """A regular file that is read at offsets, by any number of threads.

    It may be closed between two reads, when many others are in use; the file that is found when it is opened again must
    be the one that was there at first.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._identity: tuple[int, ...] | None = None
        self._map: mmap.mmap | None = None
        with _HANDLES.borrowed(self) as handle:
            self.size = os.fstat(handle).st_size

    def read(self, buffer: memoryview, offset: int, what: str) -> None:
        """Fill `buffer` with the bytes from `offset` on; `what` is what messages call them.

        Raises:
            CandidateError: the file ended, changed or vanished.
        """
        if not len(buffer):
            return
        with self.borrowed() as handle:
            problem = _read_exactly(handle, buffer, offset)
            found = os.fstat(handle)
            if not problem and found.st_size != self.size:
                problem = f"the file had {self.size} bytes when it was opened and has {found.st_size} now"
            elif not problem and identity_of(found) != self._identity:
                problem = "the file has been written since it was opened"
        if problem:
            raise CandidateError(
                f"{self.path}: {what} cannot be read: {problem}. The file was changed or removed while it was in "
                f"use, or its disk fails; {_STEADY}"
            )

    @contextmanager
    def borrowed(self) -> Iterator[int]:
        """Lend an open file descriptor to a `with` block."""
        with _HANDLES.borrowed(self) as handle:
            yield handle

    def map(self) -> mmap.mmap:
        """Return a private mapping of the whole file: torch wants to be able to write, and nobody does."""
        if self._map is None:
            with self.borrowed() as handle:
                self._map = mmap.mmap(handle, 0, access=mmap.ACCESS_COPY)
        return self._map

    def close(self) -> None:
        """Close the file; a later read opens it again, and what is mapped stays while it is in use."""
        self._map = None
        _HANDLES.drop(self)

    def open(self) -> int:
        """Open the file, and check that it is still the one that it was; for the table of open files only."""
        try:
            handle = open_regular(self.path)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            again = f", which could be read before; {_STEADY}" if self._identity else "."
            raise CandidateError(f"{self.path}: cannot be opened: {error.strerror}{again}") from error
        identity = identity_of(os.fstat(handle))
        if self._identity not in (None, identity):
            os.close(handle)
            raise CandidateError(f"{self.path}: is not the file that it was when it was first opened; {_STEADY}")
        self._identity = identity
        return handle


@dataclass
class _Lent:
    handle: int
    users: int = 0
    dropped: bool = False


class _Handles:
    """The open files of this process, least recently used first; at most a quarter of what the system allows."""

    def __init__(self) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = 512 if soft == resource.RLIM_INFINITY else max(8, min(512, soft // 4))
        self._lock = threading.Lock()
        self._open: OrderedDict[File, _Lent] = OrderedDict()

    @contextmanager
    def borrowed(self, file: File) -> Iterator[int]:
        with self._lock:
            lent = self._open.get(file) or self._add(file)
            self._open.move_to_end(file)
            lent.users += 1
        try:
            yield lent.handle
        finally:
            with self._lock:
                lent.users -= 1
                if lent.dropped and not lent.users:
                    os.close(lent.handle)

    def drop(self, file: File) -> None:
        with self._lock:
            if lent := self._open.pop(file, None):
                lent.dropped = True
                if not lent.users:  # else the last reader closes it: its number must not become another file's
                    os.close(lent.handle)

    def _add(self, file: File) -> _Lent:
        self._close_idle(self._most - 1)
        try:
            handle = file.open()
        except OSError:  # something else in this process holds the files that the system allows
            self._close_idle(0)
            try:
                handle = file.open()
            except OSError as error:
                raise CandidateError(
                    f"{file.path}: cannot be opened: {error.strerror}. Raise the limit with `ulimit -n`."
                ) from error
        self._open[file] = _Lent(handle)
        return self._open[file]

    def _close_idle(self, keep: int) -> None:
        """Close unused files, the oldest first, until at most `keep` are open."""
        for file in [file for file, lent in self._open.items() if not lent.users]:
            if len(self._open) <= keep:
                return
            os.close(self._open.pop(file).handle)


_HANDLES = _Handles()


def _read_exactly(handle: int, buffer: memoryview, offset: int) -> str | None:
    """Fill `buffer` from the file; return what went wrong, if anything did."""
    done = 0
    while done < len(buffer):  # one call reads at most 2 GiB, and a network file system may give less than asked
        try:
            count = os.preadv(handle, [buffer[done:]], offset + done)
        except OSError as error:
            return error.strerror
        if count == 0:
            return f"it ends at byte {offset + done}, {len(buffer) - done} bytes too early"
        done += count
    return None
