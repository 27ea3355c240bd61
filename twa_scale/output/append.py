"""A file that grows, on a disk that may be full for a while."""

from collections.abc import Callable
from pathlib import Path

from twa_scale.output.publish import replace_file


class Appended:
    """A file to which pieces are appended: each is whole in the file, or waits in memory until the disk takes it.

    Args:
        path: the file.
        content: what it holds at first; a file of this name is replaced.
        say: called with one line when writing begins to fail.

    Raises:
        OutputError: it cannot be created.
    """

    def __init__(self, path: Path, content: bytes, say: Callable[[str], object]) -> None:
        replace_file(path, content)
        self._path = path
        self._size = len(content)
        self._pending = b""
        self._say = say
        self._failed = False

    def write(self, piece: bytes) -> None:
        """Append `piece`, after those that wait."""
        self._pending += piece
        try:
            with self._path.open("r+b", buffering=0) as file:
                try:
                    file.seek(self._size)
                    if file.write(self._pending) == len(self._pending):
                        self._size += len(self._pending)
                        self._pending = b""
                        self._failed = False
                finally:
                    file.truncate(self._size)  # a piece that was cut short would spoil the next
            reason = "the disk took a part only"
        except OSError as error:
            reason = error.strerror or str(error)
        if self._pending and not self._failed:
            self._failed = True
            self._say(
                f"{self._path}: could not be written: {reason}. The run goes on; what belongs there is kept in memory "
                "and written when the disk takes it."
            )

    def close(self) -> None:
        """Try once more to write what waits; say how much is lost."""
        if self._pending:
            self.write(b"")
        if self._pending:
            self._say(f"{self._path}: its last {len(self._pending)} bytes could not be written, and are lost.")
