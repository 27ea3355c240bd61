"""Tokens of documents in a temporary file, so that they need no memory and can be read in any order."""

import os
import tempfile
import weakref
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from twa_scale.errors import ConfigError
from twa_scale.run.tasks.tokens.sequence import Array

_TYPE = np.dtype(np.int32)


class Spool:
    """A `Tokens` to which documents are added. Its file has no name, and is deleted with the object.

    The file has 4 bytes for each token: the token, or its complement if it is hidden. The starts of the documents are
    in memory, 8 bytes for each.
    """

    def __init__(self, location: str, vocabulary: int) -> None:
        """Create the file in the directory for temporary files (TMPDIR).

        Args:
            location: the name of the sequence in error messages.
            vocabulary: tokens have to be less than this.

        Raises:
            ConfigError: the file cannot be created.
        """
        self.location, self.count, self.has_hidden = location, 0, False
        self._vocabulary = min(vocabulary, 1 << 31)
        self._starts = array("q")
        with _named_errors():
            self._file = tempfile.TemporaryFile(prefix="twa-tokens-")  # noqa: SIM115 - open as long as this object
        weakref.finalize(self, self._file.close)

    @property
    def starts(self) -> Array:
        """Return the positions of the first tokens of the documents, int64."""
        return np.frombuffer(self._starts, np.int64) if self._starts else np.zeros(0, np.int64)

    def add(self, record: str, tokens: Array, hidden: Array | None = None) -> None:
        """Append a document.

        Args:
            record: the record in error messages.
            tokens: integers.
            hidden: whether each token is not predicted.

        Raises:
            ConfigError: a token is outside the vocabulary, or the file cannot be written.
        """
        unknown = (tokens < 0) | (tokens >= self._vocabulary)
        if unknown.any():
            raise ConfigError(
                f"{record}: token {tokens[int(unknown.argmax())]}; the vocabulary of the model is 0 to "
                f"{self._vocabulary - 1}. Use the tokenizer of the model."
            )
        stored = tokens.astype(_TYPE)
        if hidden is not None and hidden.any():
            self.has_hidden = True
            stored = np.where(hidden, ~stored, stored)
        self._starts.append(self.count)
        self.count += len(stored)
        with _named_errors():
            self._file.write(stored.tobytes())

    def finish(self) -> None:
        """Write the rest of the buffer. Call it once, after the last document."""
        with _named_errors():
            self._file.flush()

    def read(self, start: int, stop: int) -> Array:
        """Return the tokens start..stop-1."""
        stored = self._stored(start, stop)
        return np.where(stored < 0, ~stored, stored)

    def hidden(self, start: int, stop: int) -> Array:
        """Return for each of the tokens start..stop-1 whether it is not predicted."""
        result: Array = self._stored(start, stop) < 0
        return result

    def _stored(self, start: int, stop: int) -> Array:
        with _named_errors():
            raw = os.pread(self._file.fileno(), (stop - start) * _TYPE.itemsize, start * _TYPE.itemsize)
        return np.frombuffer(raw, _TYPE)


@contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{tempfile.gettempdir()}: the tokens of the data cannot be kept there: {error.strerror}. Set TMPDIR to "
            "a directory with 4 bytes of space for each token, or give files of tokens (task.tokens)."
        ) from error
