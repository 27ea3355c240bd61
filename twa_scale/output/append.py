"""A file to which a run appends, on a disk that may be full for a while."""

from collections.abc import Callable
from pathlib import Path

from twa_scale.output.publish import replace_file


class AppendedFile:
    """A file to which pieces are appended. A piece that cannot be written completely stays in memory until it can.

    Args:
        path: the file. An existing file is replaced.
        content: its first content.
        log: called with one line when writing starts to fail.

    Raises:
        OutputError: the file cannot be created.
    """

    def __init__(self, path: Path, content: bytes, log: Callable[[str], object]) -> None:
        replace_file(path, content)
        self._path = path
        self._size = len(content)
        self._pending = b""
        self._log = log
        self._failed = False

    def write(self, piece: bytes) -> None:
        """Append `piece`, after the pieces that are still in memory."""
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
                    file.truncate(self._size)  # Remove a piece that was written only in part.
            reason = "the disk took only a part"
        except OSError as error:
            reason = error.strerror or str(error)
        if self._pending and not self._failed:
            self._failed = True
            self._log(
                f"{self._path}: could not be written: {reason}. The run continues; the data is kept in memory and "
                "written when there is space."
            )

    def close(self) -> None:
        """Try once more to write the pieces in memory, and report how many bytes are lost."""
        if self._pending:
            self.write(b"")
        if self._pending:
            self._log(f"{self._path}: its last {len(self._pending)} bytes could not be written, and are lost.")
