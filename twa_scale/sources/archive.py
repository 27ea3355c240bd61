"""Files of torch.save, of which only the pickle is read: tensors are ranges of bytes in the file."""

import io
import struct
import zipfile
from typing import Any

import torch

from twa_scale.errors import CandidateError
from twa_scale.sources.handles import File
from twa_scale.sources.pickles import SafeUnpickler
from twa_scale.sources.stored import Record, Stored

_SMALL = ("data.pkl", "byteorder")
_LOCAL_HEADER = struct.Struct("<4s22xHH")


class Archive:
    """An archive of torch.save: a whole file, or a part of one.

    Raises:
        CandidateError: anything else, or an archive without its end.
    """

    def __init__(self, file: File, start: int = 0, length: int | None = None) -> None:
        self._file = file
        self._start = start
        self._length = file.size if length is None else length
        self._label = file.path if length is None else f"{file.path} at byte {start}"
        try:
            with zipfile.ZipFile(io.BufferedReader(_View(file, start, self._length))) as archive:
                self._records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                self._small = {name: archive.read(self._records[name]) for name in _SMALL if name in self._records}
        except CandidateError:
            raise
        except Exception as error:  # of a damaged archive zipfile raises almost anything
            raise CandidateError(
                f"{self._label}: is no archive that torch.save writes, or it is truncated ({error!r}). Copy it again, "
                "or leave this candidate out."
            ) from error

    def content(self) -> Any:
        """Return what was saved, tensors as `Stored`, objects of unknown classes as `Opaque`."""
        try:
            if self._small.get("byteorder", b"little") != b"little":
                raise ValueError("it was written on a big-endian machine")
            return SafeUnpickler(io.BytesIO(self._small["data.pkl"]), self._record, _tensor).load()
        except Exception as error:
            # A damaged pickle makes the unpickler raise almost anything.
            raise CandidateError(
                f"{self._label}: cannot be understood: {type(error).__name__}: {error}. Copy it again, or leave this "
                "candidate out."
            ) from error

    def _record(self, dtype: torch.dtype, key: str, numel: int) -> Record:
        return Record(self._file, dtype, numel, lambda size: self._begin(f"data/{key}", size))

    def _begin(self, name: str, nbytes: int) -> int:
        """Return the byte of the file at which a record's data starts."""
        info = self._records.get(name)
        if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size < nbytes:
            raise CandidateError(
                f"{self._label}: has no uncompressed record {name!r} of {nbytes} bytes, which its pickle refers to: it "
                "is damaged. Copy it again, or leave this candidate out."
            )
        header = bytearray(_LOCAL_HEADER.size)
        self._file.read(memoryview(header), self._start + info.header_offset, f"the header of record {name!r}")
        magic, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        if magic != b"PK\x03\x04":
            raise CandidateError(f"{self._label}: record {name!r} has no header: it is damaged. Copy it again.")
        return self._start + int(info.header_offset) + _LOCAL_HEADER.size + int(name_length) + int(extra_length)


def _tensor(record: Record, first: int, shape: Any, stride: Any, dtype: torch.dtype | None = None) -> Stored:
    if dtype is not None and dtype != record.dtype:
        record = Record(record.file, dtype, record.numel * record.dtype.itemsize // dtype.itemsize, record.locate)
    return Stored(record, int(first), tuple(map(int, shape)), tuple(map(int, stride)))


class _View(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: File, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("before the start")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        count = max(0, min(len(view), self._length - self._position))
        self._file.read(view[:count], self._start + self._position, "the archive")
        self._position += count
        return count
