"""Tensors as ranges of bytes in files, and candidates made of them."""

import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Protocol

import torch

from twa_scale.candidates.formats.crc import Pieces
from twa_scale.candidates.formats.file_handles import File
from twa_scale.candidates.formats.flat_slices import copy_flat
from twa_scale.candidates.wrapper_names import unwrapped
from twa_scale.errors import CandidateError


class Readable(Protocol):
    """A tensor that is read by slices."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """The type in which `read` delivers."""

    def read(self, start: int, out: torch.Tensor, what: str) -> None:
        """Fill `out` with the elements from `start` on, in row-major order; `what` is what messages call the tensor."""


@dataclass(frozen=True)
class Record:
    """`numel` numbers that follow each other in a file."""

    file: File
    dtype: torch.dtype
    numel: int
    locate: Callable[[int], int]
    """Given the number of bytes, returns the byte at which they start; looked up when they are first read."""
    crc: int = 0
    """CRC-32 of the bytes; 0 where the file does not give it."""
    pieces: Pieces = field(default_factory=Pieces, compare=False)

    @cached_property
    def begin(self) -> int:
        """Byte at which the first one starts."""
        return self.locate(self.nbytes)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.numel * self.dtype.itemsize

    def read(self, start: int, buffer: memoryview, what: str) -> None:
        """Fill `buffer` with the bytes from `start` on.

        Raises:
            CandidateError: the file cannot be read; or with this piece all bytes have been read in this process, and
                they do not have the CRC that the file gives.
        """
        self.file.read(buffer, self.begin + start, what)
        if self.crc and self.pieces.add(start, buffer, self.nbytes) not in (None, self.crc):
            raise CandidateError(
                f"{self.file.path}: {what} does not have the CRC-32 that was saved with it: the file is damaged. Copy "
                "it again, or leave this candidate out."
            )


@dataclass(frozen=True)
class Stored:
    """A tensor in a record: `first` is the offset of its first element, in elements; strides are those of torch."""

    record: Record
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The type in the file."""
        return self.record.dtype

    @property
    def numel(self) -> int:
        """Number of elements; a scalar has one."""
        return prod(self.shape)

    def read(self, start: int, out: torch.Tensor, what: str) -> None:
        """Fill `out` with the elements from `start` on, in row-major order."""
        assert out.dtype == self.dtype and 0 <= start <= start + len(out) <= self.numel
        if not len(out):
            return
        last = self.first + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        if min(self.first, *self.stride, 0) < 0 or last >= self.record.numel:
            raise CandidateError(
                f"{self.record.file.path}: {what} reaches beyond the {self.record.numel} numbers that are stored for "
                "it: the file is damaged. Copy it again, or leave this candidate out."
            )
        if self._row_major():
            self.record.read((self.first + start) * out.itemsize, out.view(torch.uint8).numpy().data, what)
        else:
            self._read_mapped(start, out, last + 1, what)

    @property
    def place(self) -> object:
        """What identifies the bytes in the file, and how they are read."""
        return self.record.begin, self.dtype, self.first, self.shape, self.stride

    def mapped(self) -> torch.Tensor | None:
        """Return a view of all of it in the mapped file, flattened; None where it is not aligned or not row-major."""
        begin = self.record.begin + self.first * self.dtype.itemsize
        if not self.numel:
            return torch.empty(0, dtype=self.dtype)
        if begin % self.dtype.itemsize or not self._row_major():
            return None
        return torch.frombuffer(self.record.file.map(), dtype=self.dtype, count=self.numel, offset=begin)

    def _row_major(self) -> bool:
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True

    def _read_mapped(self, start: int, out: torch.Tensor, stop: int, what: str) -> None:
        """Gather from a tensor that was saved transposed or channels_last: its slices lie all over the record."""
        begin, end = (self.record.begin + i * out.itemsize for i in (self.first, stop))
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        probe = bytearray(1)  # a page beyond the end of a mapped file would kill the process instead of raising
        self.record.file.read(memoryview(probe), end - 1, what)
        with self.record.file.borrowed() as handle:
            mapped = mmap.mmap(handle, end - page, access=mmap.ACCESS_COPY, offset=page)
        numbers = torch.frombuffer(mapped, dtype=torch.uint8)[begin - page :]
        if begin % out.itemsize:
            numbers = numbers.clone()
        copy_flat(numbers.view(out.dtype).as_strided(self.shape, self.stride), start, out)


@dataclass(frozen=True)
class Joined:
    """A tensor whose flattening is cut into ranges that lie in several records."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    ranges: Callable[[int, int], Iterator[tuple[Stored, int, int]]]
    """Given start and stop, yields (tensor, first element, number of elements) of what makes up this range."""

    def read(self, start: int, out: torch.Tensor, what: str) -> None:
        """Fill `out` with the elements from `start` on.

        Raises:
            CandidateError: a part that is stored in another type.
        """
        done = 0
        for stored, first, count in self.ranges(start, start + len(out)):
            if stored.dtype != self.dtype:
                raise CandidateError(
                    f"{stored.record.file.path}: {what} is {stored.dtype} here and {self.dtype} in the first part; all "
                    "files must be of one saving. Copy the checkpoint again, or leave it out."
                )
            stored.read(first, out[done : done + count], what)
            done += count
        assert done == len(out)


class StoredCandidate:
    """A candidate whose tensors lie in any number of files; no byte is read but those that a slice needs."""

    def __init__(
        self, tensors: Mapping[str, Readable], files: Iterable[File], label: str, directory: Path | None
    ) -> None:
        self.label = label
        self.directory = directory
        self.file_name: str | None = None
        self.metadata: dict[str, str] = {}
        self.bytes_read = 0
        self.stored_names = unwrapped(tensors, label)
        self._tensors = {name: tensors[raw] for name, raw in self.stored_names.items()}
        self._files = files

    def names(self) -> list[str]:
        """Return the tensor names without wrappers, sorted."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the type in which `read` delivers a tensor."""
        return self._tensors[name].dtype

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with the elements from `start` on, in row-major order."""
        self._tensors[name].read(start, out, f"tensor {name!r}")
        self.bytes_read += out.nbytes

    def stored_once(self, name: str, other: str) -> bool:
        """Whether two names stand for the same bytes."""
        return self._tensors[name] is self._tensors[other]

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
