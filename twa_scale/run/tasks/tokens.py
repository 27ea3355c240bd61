"""Token sequences on disk or in memory, divided into windows of equal length."""

import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from twa_scale.errors import ConfigError
from twa_scale.run.tasks.task import Batch

Array = npt.NDArray[Any]
Dtype = Literal["uint8", "uint16", "int32", "uint32", "int64"]
_SAMPLED = 4096  # tokens of a .bin file that are checked
_MIN_TEXT = 64  # bytes; fewer printable bytes may be tokens
_PRINTABLE = bytes([9, 10, 13, *range(32, 127)])
_GZIP = re.compile(rb"\x1f\x8b\x08[\x00-\x1f]")  # includes method and flags, because the first two bytes may be a token
_MAGIC_OF_LLM_C = tuple(number.to_bytes(4, "little") for number in (20240520, 20240801))
_CHECKED_WINDOWS = 16  # windows of a split whose tokens are checked at the start


class Tokens(Protocol):
    """A sequence of tokens that is read by ranges."""

    @property
    def count(self) -> int:
        """Return the number of tokens."""

    @property
    def where(self) -> str:
        """Return the name of the sequence in error messages."""

    def read(self, start: int, stop: int) -> Array:
        """Return the tokens start..stop-1."""


@dataclass(frozen=True)
class TokenFile:
    """The tokens of a file, read by ranges. The file is neither kept open nor mapped."""

    path: Path
    dtype: "np.dtype[Any]"
    offset: int
    count: int

    @classmethod
    def open(cls, path: Path, dtype: Dtype) -> "TokenFile":
        """Open a file that is a plain sequence of `dtype` without a header, and check it.

        Raises:
            ConfigError: the file cannot be read, its size is not a multiple of the token size, or its tokens seem to
                have a wider dtype.
        """
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
        width = np.dtype(dtype).itemsize
        if width > 1 and (what := _other_format(path)):
            raise ConfigError(f"{path}: is not a plain sequence of tokens, but {what}.")
        if size % width:
            raise ConfigError(
                f"{path}: {size} bytes are not a whole number of {dtype} tokens. Set the right `token_dtype`."
            )
        file = cls(path, np.dtype(dtype), 0, size // width)
        if dtype == "uint16" and _are_halves(file.read(0, min(file.count, _SAMPLED))):
            raise ConfigError(
                f"{path}: every second number is at most 3, as in 32-bit or 64-bit tokens that are read as uint16. Set "
                "task.token_dtype to uint32, int32 or int64, or write an .npy file, which contains its dtype."
            )
        return file

    @classmethod
    def open_npy(cls, path: Path) -> "TokenFile":
        """Open a .npy file and check its header.

        Raises:
            ConfigError: the file cannot be read, does not hold integers, or is in column-major order.
        """
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read as an .npy file: {error}.") from error
        if array.dtype.kind not in "iu" or not array.flags.c_contiguous or not array.ndim:
            order = "" if array.flags.c_contiguous else ", in column-major order"
            raise ConfigError(
                f"{path}: holds {array.dtype.name} of shape {array.shape}{order}. Tokens must be integers in row-major "
                "order."
            )
        return cls(path, array.dtype, array.offset, array.size)

    @property
    def where(self) -> str:
        """Return the path."""
        return str(self.path)

    def read(self, start: int, stop: int) -> Array:
        """Return the tokens start..stop-1.

        Raises:
            ConfigError: the file cannot be read, or has become shorter.
        """
        tokens = _numbers(self.path, self.dtype, stop - start, self.offset + start * self.dtype.itemsize)
        if len(tokens) < stop - start:
            raise ConfigError(
                f"{self.path}: has become shorter since the run began. Start again with files that do not change."
            )
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
    """Examples {"tokens": int64 (length,)}: disjoint windows over the concatenation of all sequences."""

    def __init__(self, sequences: list[Tokens], length: int, vocabulary: int, key: str) -> None:
        """Divide `sequences` into windows, and check some of them. An incomplete last window is dropped.

        Args:
            sequences: the token sequences.
            length: the number of tokens of a window.
            vocabulary: the size of the model's vocabulary.
            key: the setting in error messages.

        Raises:
            ConfigError: there are fewer tokens than one window, or tokens outside the vocabulary.
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
        for i in range(_CHECKED_WINDOWS):
            self[i * (self._windows - 1) // (_CHECKED_WINDOWS - 1)]

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
            parts.append(self._read_checked(self._sequences[i], position - first, end - first))
            position, i = end, i + 1
        return {"tokens": torch.from_numpy(np.concatenate(parts))}

    def _read_checked(self, sequence: Tokens, start: int, stop: int) -> Array:
        # A token outside the vocabulary would otherwise fail as an assertion in a CUDA kernel, without its position.
        stored = sequence.read(start, stop)
        tokens = stored.astype(np.int64)
        unknown = (tokens < 0) | (tokens >= self._vocabulary)
        if unknown.any():
            at = int(unknown.argmax())
            raise ConfigError(
                f"{sequence.where}: position {start + at}: token {stored[at]}; the vocabulary of the model is "
                f"0 to {self._vocabulary - 1}. Use the tokenizer of the model, and set `token_dtype` for .bin files."
            )
        return tokens


def _numbers(path: Path, dtype: "np.dtype[Any]", count: int, offset: int = 0) -> Array:
    try:
        return np.fromfile(path, dtype, count, offset=offset)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}. Make it readable.") from error


def _other_format(path: Path) -> str | None:
    """Return a description of the format and the fix, if the first bytes are not a sequence of multi-byte tokens."""
    start = _numbers(path, np.dtype(np.uint8), _SAMPLED).tobytes()
    if start.startswith(b"\x93NUMPY"):
        return "a numpy array: rename it to .npy, so that its dtype is read"
    if start.startswith((b"PK\x03\x04", b"\x28\xb5\x2f\xfd")) or _GZIP.match(start):
        return "an archive or a compressed file: extract it"
    if start[:4] in _MAGIC_OF_LLM_C:
        return "a file of llm.c with a header of 1024 bytes: remove the header, or write an .npy file"
    if len(start) >= _MIN_TEXT and not start.translate(None, _PRINTABLE):
        return "plain text: give it as task.text, or set task.token_dtype: uint8 if its bytes are the tokens"
    return None


def _are_halves(tokens: Array) -> bool:
    """Return whether every second number seems to be the upper half of a 32-bit token, which is at most 3."""
    return len(tokens) >= 64 and int(tokens[1::2].max()) <= 3 < int(tokens[::2].max())
