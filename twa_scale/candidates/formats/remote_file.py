"""Files that are read by ranges from a URL."""

from twa_scale.base.urls import Url
from twa_scale.candidates.formats.file_handles import change
from twa_scale.errors import CandidateError


class RemoteFile:
    """A file of another machine that any number of threads read at offsets.

    After each read the file system is asked whether the file is still the same, because no descriptor keeps it.
    """

    def __init__(self, url: Url) -> None:
        self.path = str(url)
        self._url = url
        self._identity = url.identity()
        self.size = self._identity[0]

    def read(self, buffer: memoryview, offset: int, what: str) -> None:
        """Fill `buffer` with the bytes that begin at `offset`.

        Args:
            buffer: where the bytes go.
            offset: the first byte in the file.
            what: the name of the bytes in error messages.

        Raises:
            CandidateError: the file ends too early, or was changed or removed.
        """
        if not len(buffer):
            return
        content = self._url.read(offset, offset + len(buffer))
        if problem := self._change() or _other_length(len(content), len(buffer)):
            raise CandidateError(
                f"{self.path}: {what} cannot be read: {problem}. Candidates must not change until the run has ended."
            )
        buffer[:] = content

    def _change(self) -> str | None:
        found = self._url.identity()
        return change(self.size, found[0], written=found != self._identity)

    def close(self) -> None:
        """Do nothing: no connection is kept."""


def _other_length(found: int, wanted: int) -> str | None:
    if found == wanted:
        return None
    return f"the server sent {found} bytes, where {wanted} were asked for: it does not serve ranges, or is damaged"
