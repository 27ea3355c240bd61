"""Tensors that are byte ranges of files, and candidates that consist of them."""

import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Protocol

import torch

from twa_scale.candidates.formats.crc import PiecewiseCrc
from twa_scale.candidates.formats.file_handles import File
from twa_scale.candidates.formats.flat_slices import copy_flat
from twa_scale.candidates.formats.origin import Origin
from twa_scale.candidates.wrapper_names import unwrapped
from twa_scale.errors import CandidateError


class ReadableTensor(Protocol):
    """A tensor that can be read by slices."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensor, which is that of the tensors given to `read`."""

    def read(self, start: int, out: torch.Tensor, description: str) -> None:
        """Fill a 1-D tensor with elements in row-major order.

        Args:
            start: the first element in the row-major flattening.
            out: receives elements [start, start + len(out)).
            description: the name of the tensor in error messages.
        """


@dataclass(frozen=True)
class Record:
    """A contiguous sequence of `numel` numbers in a file, such as a storage of torch."""

    file: File
    dtype: torch.dtype
    numel: int
    locate: Callable[[int], int]
    """A function of the number of bytes that returns the offset of the first byte. It is called at the first read."""
    crc: int = 0
    """The CRC-32 of the bytes, or 0 if the file does not have it."""
    crc_fields: Callable[[], Sequence[int]] = field(default=tuple, compare=False)
    """Returns the offsets of the places in the file that hold the CRC-32 (4 bytes, little-endian)."""
    pieces: PiecewiseCrc = field(default_factory=PiecewiseCrc, compare=False)

    @cached_property
    def begin(self) -> int:
        """The offset of the first byte in the file."""
        return self.locate(self.nbytes)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.numel * self.dtype.itemsize

    def read(self, start: int, buffer: memoryview, description: str) -> None:
        """Fill `buffer` with the bytes that begin at `start`, and check the CRC once all bytes have been read.

        Raises:
            CandidateError: the file cannot be read, or the bytes do not have the CRC of the file.
        """
        self.file.read(buffer, self.begin + start, description)
        if self.crc and self.pieces.add(start, buffer, self.nbytes) not in (None, self.crc):
            raise CandidateError(
                f"{self.file.path}: {description} does not have the CRC-32 that was saved with it: the file is "
                "damaged. Copy it again, or leave this candidate out."
            )


@dataclass(frozen=True)
class Stored:
    """A tensor that is a strided view of a record."""

    record: Record
    first: int
    """The index of the first element in the record."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """Strides in elements, as in torch."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in the file."""
        return self.record.dtype

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    def read(self, start: int, out: torch.Tensor, description: str) -> None:
        """Fill `out` with the elements that begin at `start`, in row-major order."""
        assert out.dtype == self.dtype and 0 <= start <= start + len(out) <= self.numel
        if not len(out):
            return
        last = self.first + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        if min(self.first, *self.stride, 0) < 0 or last >= self.record.numel:
            raise CandidateError(
                f"{self.record.file.path}: {description} reaches beyond the {self.record.numel} numbers of its "
                "storage: the file is damaged. Copy it again, or leave this candidate out."
            )
        if self.row_major():
            self.record.read((self.first + start) * out.itemsize, out.view(torch.uint8).numpy().data, description)
        else:
            self._read_mapped(start, out, last + 1, description)

    def extent(self) -> tuple[int, int]:
        """Return the first byte of the tensor in the file, and the one after its last."""
        last = self.first + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        itemsize = self.dtype.itemsize
        return self.record.begin + self.first * itemsize, self.record.begin + (last + 1) * itemsize

    def vector(self, first: int, count: int) -> "Stored":
        """Return elements [first, first + count) of a row-major tensor, as a vector."""
        return Stored(self.record, self.first + first, (count,), (1,))

    @property
    def memory_key(self) -> object:
        """A value that identifies the bytes in the file and their interpretation."""
        return self.record.begin, self.dtype, self.first, self.shape, self.stride

    def mapped(self) -> torch.Tensor | None:
        """Return a flat view of the tensor in the mapped file, or None if it is not aligned or not row-major."""
        begin = self.record.begin + self.first * self.dtype.itemsize
        if not self.numel:
            return torch.empty(0, dtype=self.dtype)
        if begin % self.dtype.itemsize or not self.row_major():
            return None
        return self.record.file.mapped(begin, self.numel, self.dtype)

    def row_major(self) -> bool:
        """Return whether the elements follow each other in the file in row-major order."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True

    def _read_mapped(self, start: int, out: torch.Tensor, stop: int, description: str) -> None:
        """Read a slice of a transposed or channels_last tensor, whose elements are scattered over the record."""
        begin, end = (self.record.begin + i * out.itemsize for i in (self.first, stop))
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        # Read the last byte first: access to a page beyond the end of a mapped file would kill the process (SIGBUS).
        probe = bytearray(1)
        self.record.file.read(memoryview(probe), end - 1, description)
        with self.record.file.descriptor() as handle:
            mapped = mmap.mmap(handle, end - page, access=mmap.ACCESS_COPY, offset=page)
        numbers = torch.frombuffer(mapped, dtype=torch.uint8)[begin - page :]
        if begin % out.itemsize:
            numbers = numbers.clone()
        copy_flat(numbers.view(out.dtype).as_strided(self.shape, self.stride), start, out)


@dataclass(frozen=True)
class ConcatenatedTensor:
    """A tensor whose flattening is a concatenation of ranges of several stored tensors."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    ranges: Callable[[int, int], Iterator[tuple[Stored, int, int]]]
    """A function of (start, stop) that yields (stored tensor, first element, number of elements) in order."""

    def read(self, start: int, out: torch.Tensor, description: str) -> None:
        """Fill `out` with the elements that begin at `start`.

        Raises:
            CandidateError: a part has another dtype.
        """
        done = 0
        for stored, first, count in self.ranges(start, start + len(out)):
            if stored.dtype != self.dtype:
                raise CandidateError(
                    f"{stored.record.file.path}: {description} is {stored.dtype} here and {self.dtype} in the first "
                    "part; all files must come from the same save. Copy the checkpoint again, or leave it out."
                )
            stored.read(first, out[done : done + count], description)
            done += count
        assert done == len(out)


class StoredCandidate:
    """A candidate whose tensors are in any number of files. A read transfers only the bytes of its slice."""

    def __init__(
        self,
        tensors: Mapping[str, ReadableTensor],
        files: Iterable[File],
        label: str,
        directory: Path | None,
        origin: Origin | None = None,
    ) -> None:
        self.label = label
        self.origin = origin or Origin("a candidate of another format")
        self.directory = directory
        self.file_name: str | None = None
        self.metadata: dict[str, str] = {}
        self.bytes_read = 0
        self.stored_names = unwrapped(tensors, label)
        self._tensors = {name: tensors[raw] for name, raw in self.stored_names.items()}
        self._files = files

    def names(self) -> list[str]:
        """Return the tensor names without the prefixes of wrappers, sorted."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor, which is that of the tensors given to `read`."""
        return self._tensors[name].dtype

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with the elements that begin at `start`, in row-major order."""
        self._tensors[name].read(start, out, f"tensor {name!r}")
        self.bytes_read += out.nbytes

    def stored_once(self, name: str, other: str) -> bool:
        """Return whether two names refer to the same bytes."""
        return self._tensors[name] is self._tensors[other]

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
