"""Files that are read by ranges from a URL."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from twa_scale.base.urls import Url
from twa_scale.candidates.formats.file_handles import change
from twa_scale.errors import CandidateError


class RemoteFile:
    """A file of another machine that any number of threads read at offsets.

    After each read, the file system is asked whether the file is unchanged, because there is no open descriptor. Inside
    `check_once_at_end`, it is asked once at the end.
    """

    def __init__(self, url: Url) -> None:
        self.path = str(url)
        self._url = url
        self._identity = url.identity()
        self.size = self._identity[0]

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
        content = self._url.read(offset, offset + len(buffer))
        fits = len(content) == len(buffer)
        deferred: dict[RemoteFile, str] | None = getattr(_this_thread, "files", None)
        if deferred is not None and fits:
            deferred.setdefault(self, description)
        else:
            self.require_unchanged(description)
        if not fits:
            raise self._error(
                description,
                f"the server sent {len(content)} bytes, where {len(buffer)} were requested: it does not serve ranges, "
                "or is damaged",
            )
        buffer[:] = content

    def require_unchanged(self, description: str) -> None:
        """Check with the file system that the file is still the one that was opened.

        Args:
            description: the name of the bytes that were read, in error messages.

        Raises:
            CandidateError: it was changed or removed.
        """
        identity = self._url.identity()
        if problem := change(self.size, identity[0], written=identity != self._identity):
            raise self._error(description, problem)

    def _error(self, description: str, problem: str) -> CandidateError:
        return CandidateError(
            f"{self.path}: {description} cannot be read: {problem}. Candidates must not change until the run has ended."
        )

    def close(self) -> None:
        """Do nothing, because no connection is kept."""


_this_thread = threading.local()


@contextmanager
def check_once_at_end() -> Iterator[None]:
    """Check each file once, at the end of a `with` block, with one request for many reads.

    This applies to the reads of the thread that enters the block. Use the values only after the block.

    Raises:
        CandidateError: a file was changed or removed. It replaces errors about the content of a file that has changed.
    """
    files: dict[RemoteFile, str] = {}
    _this_thread.files = files
    try:
        yield
    finally:
        _this_thread.files = None
        for file, description in files.items():
            file.require_unchanged(description)
