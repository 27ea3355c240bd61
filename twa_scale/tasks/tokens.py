"""Token sequences on disk or in memory, cut into windows of equal length."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from twa_scale.errors import ConfigError
from twa_scale.tasks.protocol import Batch

Array = npt.NDArray[Any]
DTYPES = ("uint8", "uint16", "int32")


class Tokens(Protocol):
    """A sequence of tokens that is read by ranges."""

    @property
    def count(self) -> int:
        """Return the number of tokens."""

    @property
    def where(self) -> str:
        """Return what messages call it."""

    def read(self, start: int, stop: int) -> Array:
        """Return the tokens start..stop-1."""


@dataclass(frozen=True)
class TokenFile:
    """Tokens of a file, read by exact ranges: no memory, open file or mapping for each of many files."""

    path: Path
    dtype: str
    offset: int
    count: int

    @classmethod
    def open(cls, path: Path, dtype: str) -> "TokenFile":
        """Look at a bare sequence of `dtype`.

        Raises:
            ConfigError: unreadable, or of a size that `dtype` does not divide.
        """
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
        width = np.dtype(dtype).itemsize
        if size % width:
            raise ConfigError(
                f"{path}: {size} bytes are no whole number of {dtype} tokens. Set the right `token_dtype`."
            )
        return cls(path, dtype, 0, size // width)

    @classmethod
    def open_npy(cls, path: Path) -> "TokenFile":
        """Look at the header of a .npy file.

        Raises:
            ConfigError: unreadable, not one-dimensional, or of another type than uint8, uint16, int32.
        """
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: is no .npy file that can be read: {error}.") from error
        if array.ndim != 1 or array.dtype.name not in DTYPES:
            raise ConfigError(
                f"{path}: holds {array.dtype.name} of shape {array.shape}. "
                f"Tokens are one sequence of {', '.join(DTYPES)}."
            )
        return cls(path, array.dtype.name, array.offset, len(array))

    @property
    def where(self) -> str:
        """Return the path."""
        return str(self.path)

    def read(self, start: int, stop: int) -> Array:
        """Return the tokens start..stop-1.

        Raises:
            ConfigError: the file vanished or shrank.
        """
        dtype = np.dtype(self.dtype)
        try:
            tokens = np.fromfile(self.path, dtype, stop - start, offset=self.offset + start * dtype.itemsize)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read: {error.strerror}.") from error
        if len(tokens) < stop - start:
            raise ConfigError(f"{self.path}: has become shorter since the run began. Start again with files at rest.")
        return tokens


@dataclass(frozen=True)
class TokenArray:
    """Tokens in memory."""

    tokens: Array
    where: str

    @property
    def count(self) -> int:
        """Return the number of tokens."""
        return len(self.tokens)

    def read(self, start: int, stop: int) -> Array:
        """Return the tokens start..stop-1."""
        return self.tokens[start:stop]


class Windows:
    """Examples {"tokens": int64 (length,)}: windows without overlap, over all sequences laid end to end."""

    def __init__(self, sequences: list[Tokens], length: int, vocabulary: int, key: str) -> None:
        """Cut `sequences`; tokens that fill no last window are left out.

        Args:
            sequences: What to read.
            length: Tokens of a window.
            vocabulary: Number of tokens that the model knows.
            key: Setting to name in messages.

        Raises:
            ConfigError: fewer tokens than one window.
        """
        self._sequences = [sequence for sequence in sequences if sequence.count]
        self._ends = list(accumulate(sequence.count for sequence in self._sequences))
        self._length = length
        self._vocabulary = vocabulary
        total = self._ends[-1] if self._ends else 0
        if total < length:
            raise ConfigError(
                f"{key}: {len(sequences)} files with {total} tokens, fewer than one window of context + 1 = "
                f"{length}. Give more data, a shorter `context`, other `fractions`, or files for each split."
            )
        self._windows = total // length

    def __len__(self) -> int:
        return self._windows

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < self._windows:
            raise IndexError(f"window {index} of {self._windows}")
        parts = []
        position, stop = index * self._length, (index + 1) * self._length
        i = bisect_right(self._ends, position)
        while position < stop:
            first = self._ends[i] - self._sequences[i].count
            end = min(stop, self._ends[i])
            parts.append(self._known(self._sequences[i], position - first, end - first))
            position, i = end, i + 1
        return {"tokens": torch.from_numpy(np.concatenate(parts))}

    def _known(self, sequence: Tokens, start: int, stop: int) -> Array:
        # A token out of range would end as an assertion inside a GPU kernel, far from its cause.
        tokens = sequence.read(start, stop).astype(np.int64)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._vocabulary:
            raise ConfigError(
                f"{sequence.where}: token {low if low < 0 else high} near {start}; the model knows "
                f"0 to {self._vocabulary - 1}. Use its own tokenizer; name the `token_dtype` of bare files."
            )
        return tokens
