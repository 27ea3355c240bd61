"""Files of tokens: plain sequences, numpy arrays, and files of llm.c and Megatron-LM."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from twa_scale.errors import ConfigError
from twa_scale.run.tasks.tokens import megatron
from twa_scale.run.tasks.tokens.sequence import Array, NothingHidden

Dtype = Literal["uint8", "uint16", "int32", "uint32", "int64"]
_SAMPLED = 4096  # tokens of a .bin file that are checked
_MIN_TEXT = 64  # bytes; fewer printable bytes may be tokens
_PRINTABLE = bytes([9, 10, 13, *range(32, 127)])
_GZIP = re.compile(rb"\x1f\x8b\x08[\x00-\x1f]")  # includes method and flags, because the first two bytes may be a token
_LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic of llm.c: version and dtype
_HEADER_OF_LLM_C = 1024  # bytes: 256 integers, the third of which is the number of tokens
_SCANNED = 1 << 22  # tokens that are searched at a time for the end of a document


@dataclass(frozen=True)
class TokenFile(NothingHidden):
    """The tokens of a file, read by ranges. The file is neither kept open nor mapped."""

    path: Path
    dtype: "np.dtype[Any]"
    offset: int
    count: int
    starts: Array | None = None

    @classmethod
    def open(cls, path: Path, dtype: Dtype) -> "TokenFile":
        """Open a file that is a plain sequence of `dtype` without a header, and check it.

        Raises:
            ConfigError: the file cannot be read, its size is not a multiple of the token size, or its tokens seem to
                have a wider dtype.
        """
        size = _size(path)
        width = np.dtype(dtype).itemsize
        if width > 1 and (format_name := _other_format(path)):
            raise ConfigError(f"{path}: is not a plain sequence of tokens, but {format_name}.")
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

    @classmethod
    def open_with_header(cls, path: Path) -> "TokenFile | None":
        """Open a file whose header or index gives its dtype: of llm.c, or of Megatron-LM with its `.idx`.

        Returns:
            The file, or None if it has neither.

        Raises:
            ConfigError: the header or index is damaged, or does not fit the size of the file.
        """
        size = _size(path)
        if index := megatron.index_of(path):
            dtype, starts = megatron.read_index(index, size)
            return cls(path, dtype, 0, size // dtype.itemsize, starts)
        header = _numbers(path, np.dtype("<i4"), 3)
        if len(header) < 3 or int(header[0]) not in _LLM_C:
            return None
        version, name = _LLM_C[int(header[0])]
        count, dtype = int(header[2]), np.dtype(name)
        if header[1] != version or size != _HEADER_OF_LLM_C + count * dtype.itemsize:
            raise ConfigError(
                f"{path}: begins like a file of llm.c, version {header[1]} with {count} tokens, but has {size} bytes. "
                f"Version {version} needs {_HEADER_OF_LLM_C} bytes and {dtype.itemsize} for each token. Write it again."
            )
        return cls(path, dtype, _HEADER_OF_LLM_C, count)

    def with_one_document(self) -> "TokenFile":
        """Return this file as one document."""
        return replace(self, starts=np.zeros(1, np.int64))

    def divided_after(self, end: int) -> "TokenFile":
        """Return this file with the documents that end with the token `end`. It is read once, in pieces."""
        document_starts = [np.zeros(1, np.int64)]
        for start in range(0, self.count, _SCANNED):
            piece = self.read(start, min(self.count, start + _SCANNED))
            document_starts.append(np.flatnonzero(piece == end) + (start + 1))
        starts = np.concatenate(document_starts)
        return replace(self, starts=starts[starts < self.count])

    def has_ends(self, end: int) -> bool:
        """Return whether a document of this file, divided after the token `end`, ends with it."""
        several = self.starts is not None and len(self.starts) > 1
        return several or (self.count > 0 and int(self.read(self.count - 1, self.count)[0]) == end)

    @property
    def location(self) -> str:
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


def _numbers(path: Path, dtype: "np.dtype[Any]", count: int, offset: int = 0) -> Array:
    try:
        return np.fromfile(path, dtype, count, offset=offset)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}. Make it readable.") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error


def _other_format(path: Path) -> str | None:
    """Return a description of the format and the fix, if the first bytes are not a sequence of multi-byte tokens."""
    start = _numbers(path, np.dtype(np.uint8), _SAMPLED).tobytes()
    if start.startswith(b"\x93NUMPY"):
        return "a numpy array: rename it to .npy, so that its dtype is read"
    if start.startswith((b"PK\x03\x04", b"\x28\xb5\x2f\xfd")) or _GZIP.match(start):
        return "an archive or a compressed file: extract it"
    if start.startswith(megatron.MAGIC):
        return "an index of Megatron-LM: give its .bin file"
    if len(start) >= _MIN_TEXT and not start.translate(None, _PRINTABLE):
        return "plain text: give it as task.text, or set task.token_dtype: uint8 if its bytes are the tokens"
    return None


def _are_halves(tokens: Array) -> bool:
    """Return whether every second number seems to be the upper half of a 32-bit token, which is at most 3."""
    return len(tokens) >= 64 and int(tokens[1::2].max()) <= 3 < int(tokens[::2].max())
