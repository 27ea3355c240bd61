"""Sequences of tokens that are read by ranges, and their concatenation."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from twa_scale.errors import ConfigError

Array = npt.NDArray[Any]


class Tokens(Protocol):
    """A sequence of tokens that is read by ranges."""

    @property
    def count(self) -> int:
        """Return the number of tokens."""

    @property
    def location(self) -> str:
        """Return the name of the sequence in error messages."""

    @property
    def starts(self) -> Array | None:
        """Return the positions of the first tokens of its documents, int64 and ascending, or None if not known."""

    @property
    def has_hidden(self) -> bool:
        """Return whether some tokens are read but not predicted, such as the questions of a chat."""

    def read(self, start: int, stop: int) -> Array:
        """Return the tokens start..stop-1."""

    def hidden(self, start: int, stop: int) -> Array:
        """Return for each of the tokens start..stop-1 whether it is not predicted. Called if `has_hidden`."""


class NothingHidden:
    """Part of a `Tokens` whose tokens are all predicted."""

    @property
    def has_hidden(self) -> bool:
        """Return False."""
        return False

    def hidden(self, start: int, stop: int) -> Array:
        """Return False for each token."""
        return np.zeros(stop - start, bool)


@dataclass(frozen=True)
class TokenArray(NothingHidden):
    """Tokens in memory or in a mapped file."""

    tokens: Array
    location: str
    starts: Array | None = None

    @property
    def count(self) -> int:
        """Return the number of tokens."""
        return len(self.tokens)

    def read(self, start: int, stop: int) -> Array:
        """Return the tokens start..stop-1."""
        return self.tokens[start:stop]


class Concatenation:
    """The tokens of several sequences, one after the other. Tokens are checked when they are read."""

    def __init__(self, sequences: Sequence[Tokens], vocabulary: int) -> None:
        """Concatenate `sequences`, whose tokens have to be less than `vocabulary`."""
        self._sequences = [sequence for sequence in sequences if sequence.count]
        self._ends = list(accumulate(sequence.count for sequence in self._sequences))
        self._vocabulary = vocabulary
        self.num_files = len(sequences)
        self.count = self._ends[-1] if self._ends else 0
        self.has_hidden = any(sequence.has_hidden for sequence in self._sequences)

    def read(self, start: int, stop: int) -> Array:
        """Return the tokens start..stop-1 as int64.

        Raises:
            ConfigError: a token is outside the vocabulary. It names the file and the position.
        """
        return np.concatenate([self._checked(s, first, end) for s, first, end in self._parts(start, stop)])

    def hidden(self, start: int, stop: int) -> Array:
        """Return for each of the tokens start..stop-1 whether it is not predicted."""
        return np.concatenate([s.hidden(first, end) for s, first, end in self._parts(start, stop)])

    def starts(self, key: str) -> Array:
        """Return the positions of the first tokens of all documents, int64.

        Raises:
            ConfigError: the documents of a sequence are not known.
        """
        result = []
        for sequence, end in zip(self._sequences, self._ends, strict=True):
            if sequence.starts is None:
                raise ConfigError(
                    f"{key}: the starts of documents in {sequence.location} are not known. Set task.document_end to "
                    "the token that ends each document, give a file of Megatron with its .idx, or use documents: "
                    "joined."
                )
            result.append(sequence.starts + (end - sequence.count))
        return np.concatenate(result) if result else np.zeros(0, np.int64)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[Tokens, int, int]]:
        """Yield (sequence, start, stop) in the sequences, for the tokens start..stop-1."""
        i = bisect_right(self._ends, start)
        while start < stop:
            first = self._ends[i] - self._sequences[i].count
            end = min(stop, self._ends[i])
            yield self._sequences[i], start - first, end - first
            start, i = end, i + 1

    def _checked(self, sequence: Tokens, start: int, stop: int) -> Array:
        # A token outside the vocabulary would otherwise fail as an assertion in a CUDA kernel, without its position.
        stored = sequence.read(start, stop)
        tokens = stored.astype(np.int64)
        unknown = (tokens < 0) | (tokens >= self._vocabulary)
        if unknown.any():
            at = int(unknown.argmax())
            raise ConfigError(
                f"{sequence.location}: position {start + at}: token {stored[at]}; the vocabulary of the model is "
                f"0 to {self._vocabulary - 1}. Use the tokenizer of the model, and set `token_dtype` for .bin files."
            )
        return tokens
